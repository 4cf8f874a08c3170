"""The pinned upstream release, and reading this folder's TOML files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import ForkError

ROOT = Path(__file__).resolve().parents[3]
PIN = Path("python/upstream/pin.toml")

_HEAD = "# The upstream release that this fork is built from. `fork.py rebase VERSION --write` rewrites this file.\n"


def read_toml(path: Path) -> dict:
    """The parsed file. Raises ForkError where it is missing or no TOML, or the interpreter is too old to read it."""
    if sys.version_info < (3, 11):
        raise ForkError(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ForkError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ForkError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Pin:
    """An upstream release: `version` "1.2.3", `local` "kvtuner.1" (the fork's own release), `sha256` by wheel file name."""

    version: str
    local: str
    sha256: dict[str, str]

    @property
    def release(self) -> str:
        """The fork's release, such as "1.2.3+kvtuner.1": the version without the digest of the code."""
        return f"{self.version}+{self.local}"

    @classmethod
    def load(cls, root: Path = ROOT) -> Pin:
        """The pin of the repository at `root`. Raises ForkError where a key is missing."""
        table = read_toml(root / PIN)
        try:
            return cls(table["version"], table["local"], table["sha256"])
        except KeyError as missing:
            raise ForkError(f"{PIN}: {missing} is missing") from None

    def save(self, root: Path = ROOT) -> None:
        lines = [f'version = "{self.version}"', f'local = "{self.local}"', "", "[sha256]"]
        lines += [f'"{name}" = "{digest}"' for name, digest in sorted(self.sha256.items())]
        (root / PIN).write_text(_HEAD + "\n".join(lines) + "\n", encoding="utf-8")
