"""The tuner: finds per-layer bits for a model, scored on the engine's own packed cache."""
