"""From flags and presets to one cache format that all ranks agree on."""
