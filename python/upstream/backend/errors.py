"""The one exception of this package."""

from __future__ import annotations


class ForkError(SystemExit):
    """A reason why there is no wheel, in words for the person who builds it.

    It is a SystemExit, so that pip and the command line show the message alone and no traceback.
    """

    def __init__(self, message: str):
        super().__init__(f"error: {message}")
        self.message = message

    def __str__(self) -> str:
        return self.message
