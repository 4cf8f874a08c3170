"""What the tuner raises for input that cannot work."""

from __future__ import annotations


class TuningError(ValueError):
    """The message names the flag or the file, the value, and what would be valid."""


def import_optional(name: str):
    """Import a module of the tuner's optional packages. Raises TuningError, with the pip command, where it is missing."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise TuningError(
            f"{package} cannot be imported ({error}); install what the tuner needs: pip install optuna matplotlib"
        ) from error
