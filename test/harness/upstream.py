"""Other packages than the one under test: pristine upstream's, and a build of the fork with other own code."""

import os
import shutil
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


def other_build(folder):
    """Put a package that differs from the running one in one own file, and so in its version, into ``folder``.

    Returns its version. ``folder`` then goes first in a server's PYTHONPATH.
    """
    import sglang
    from sglang.version import __version__

    # Links, bytecode included: it stays valid, and the package is there at once.
    package = Path(shutil.copytree(sglang.__path__[0], Path(folder) / "sglang", copy_function=os.symlink))
    version = f"{__version__.partition('+')[0]}+kvtuner.1.x0000000000aa"
    for name, old, new in (("version.py", __version__, version), ("srt/kvtuner/hooks.py", "", "# other code\n")):
        path = package / name
        text = path.read_text(encoding="utf-8")
        path.unlink()
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return version
