"""Getting the pinned upstream wheel for this interpreter, checked by hash wherever it comes from."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from packaging.tags import Tag, sys_tags
from packaging.utils import parse_wheel_filename

from .errors import ForkError
from .pin import Pin

WHEEL = "SGLANG_UPSTREAM_WHEEL"
FIND_LINKS = "SGLANG_UPSTREAM_FIND_LINKS"
CACHE = "SGLANG_UPSTREAM_CACHE"


def select(pin: Pin, tags: Iterable[Tag] | None = None) -> str:
    """The file name of the pinned wheel that suits `tags`, by default those of this interpreter.

    Raises ForkError, naming the tag and the pinned wheels, where there is none.
    """
    tags = list(sys_tags() if tags is None else tags)
    for tag in tags:
        for name in sorted(pin.sha256):
            if tag in parse_wheel_filename(name)[3]:
                return name
    pinned = "".join(f"\n  {name}" for name in sorted(pin.sha256))
    raise ForkError(f"no upstream wheel is pinned for this interpreter and platform ({tags[0]}); pinned are:{pinned}")


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(pin: Pin, name: str | None = None) -> BinaryIO:
    """A pinned wheel, open for reading, with the pinned hash: that of this interpreter, or the one with file name `name`.

    What is read is in memory: whatever happens to the file that it came from, its bytes are those that were checked.
    It comes from the file in $SGLANG_UPSTREAM_WHEEL, else from the folder in
    $SGLANG_UPSTREAM_FIND_LINKS, else from the cache ($SGLANG_UPSTREAM_CACHE), which pip fills. Raises ForkError where it
    is missing or its hash is another.
    """
    name = select(pin) if name is None else name
    if given := os.environ.get(WHEEL):
        return _checked(Path(given), pin.sha256[name], f"{WHEEL}: ", name)
    if folder := os.environ.get(FIND_LINKS):
        return _checked(Path(folder, name), pin.sha256[name], f"{FIND_LINKS}: ", name)
    cached = cache_folder() / name
    if cached.is_file():
        with suppress(ForkError):
            return _checked(cached, pin.sha256[name], "", name)
    _download_pinned(pin, name, cached)
    return _checked(cached, pin.sha256[name], "", name)


def cache_folder() -> Path:
    """The folder that keeps downloaded wheels; created where needed. Raises ForkError where that fails."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE) or Path(base, "sglang-kvtuner"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ForkError(f"cannot create the folder {folder}: {error.strerror}; name another in {CACHE}") from None
    return folder


def pip_download(folder: Path, *arguments: str) -> Path:
    """The one wheel that `pip download` with these arguments leaves in the empty `folder`. Raises PipFailed."""
    # A user's constraints have no hashes, which would stop hash-checking mode; they are not about this file.
    environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(folder), *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = sorted(folder.glob("*.whl"))
    if result.returncode or len(found) != 1:
        raise PipFailed(result.stdout)
    return found[0]


class PipFailed(Exception):
    """pip's output, where a download failed."""

    def reason(self) -> str:
        """pip's last error line, or else the last line that it wrote."""
        lines = [line.strip() for line in str(self).splitlines() if line.strip()] or ["pip said nothing"]
        return ([line for line in lines if line.startswith("ERROR: ")] or lines)[-1].removeprefix("ERROR: ")


def _download_pinned(pin: Pin, name: str, target: Path) -> None:
    expected = pin.sha256[name]
    # In the target's folder, so that the finished file can be moved into place in one step.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"sglang=={pin.version} --hash=sha256:{expected}\n", encoding="utf-8")
        try:
            found = pip_download(Path(folder), *_tag_options(name), "--require-hashes", "-r", str(requirements))
        except PipFailed as failure:
            if got := re.search(r"Got\s+([0-9a-f]{64})", str(failure)):
                raise ForkError(_wrong_hash(name, expected, got[1])) from None
            raise ForkError(
                f"pip could not download {name}: {failure.reason()}\n"
                f"Without an index, name the file in {WHEEL} or its folder in {FIND_LINKS}."
            ) from None
        # pip has checked the hash; it is checked again each time that the cached file is read.
        os.replace(found, target)


def _tag_options(name: str) -> list[str]:
    """Options with which pip takes the wheel `name`, whatever interpreter and machine it runs on."""
    tags = sorted(parse_wheel_filename(name)[3], key=str)
    options = [f"--platform={tag.platform}" for tag in tags] + [f"--abi={tag.abi}" for tag in tags]
    python = tags[0].interpreter
    return [*dict.fromkeys(options), f"--implementation={python[:2]}", f"--python-version={python[2:]}"]


def _checked(path: Path, expected: str, prefix: str, name: str) -> BinaryIO:
    """The file as it was when its hash was checked. Raises ForkError where it has another."""
    if not path.is_file():
        raise ForkError(f"{prefix}{path} is no file; {name} is needed")
    data = path.read_bytes()
    if (got := hashlib.sha256(data).hexdigest()) != expected:
        raise ForkError(prefix + _wrong_hash(path.name, expected, got))
    return io.BytesIO(data)


def _wrong_hash(name: str, expected: str, got: str) -> str:
    return f"{name} is not the pinned file: sha256\n  expected {expected}\n  got      {got}"
