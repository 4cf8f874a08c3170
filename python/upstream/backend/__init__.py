"""The build backend that composes the fork: the pinned upstream wheel, the edits, the project's own files."""
