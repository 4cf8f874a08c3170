"""The pristine upstream package, for comparisons with the fork."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def unpack_upstream(folder):
    """Unpack the pinned upstream wheel into ``folder``, which then goes first in a server's PYTHONPATH."""
    sys.path.insert(0, str(ROOT / "python" / "upstream"))
    try:
        from backend import fetch, pin, wheel
    finally:
        sys.path.pop(0)
    wheel.unpack(fetch.fetch(pin.Pin.load()), folder)
    return folder
