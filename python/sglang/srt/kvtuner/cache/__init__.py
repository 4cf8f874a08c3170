"""What the cache holds: buffers of pages, rings and sinks, upstream's pool over them, their sizes and the report."""
