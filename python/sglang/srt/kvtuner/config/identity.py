"""Which build of the fork this is, as the version of the package says."""

from __future__ import annotations

import re
from dataclasses import dataclass

_VERSION = re.compile(r"(?P<upstream>[^+]+)\+kvtuner\.(?P<release>\d+)\.(?P<digest>\w+)(?P<editable>\.editable)?")


@dataclass(frozen=True)
class Identity:
    """version: in full. upstream: the release that was built on. release: the fork's own, counted for each of upstream's.
    digest: of the own files and the edits of upstream's. editable: own files are links, and can have changed since."""

    version: str
    upstream: str
    release: int
    digest: str
    editable: bool

    @classmethod
    def parse(cls, version: str) -> Identity:
        """Raises ValueError where it is no version of this fork."""
        found = _VERSION.fullmatch(version)
        if found is None:
            raise ValueError(
                f"sglang's version is {version}, which is no version of this fork, such as "
                "0.5.23+kvtuner.1.x0123456789ab: install the package again"
            )
        release, editable = int(found["release"]), bool(found["editable"])
        return cls(version, found["upstream"], release, found["digest"], editable)

    def describe(self) -> str:
        """Lines for a person."""
        lines = {
            "sglang": self.version,
            "upstream": self.upstream,
            "release": self.release,
            "digest": f"{self.digest} (of own files and edits)",
        }
        if self.editable:
            lines["editable"] = "own files are links to a checkout, and can have changed since it was installed"
        return "\n".join(f"{name:<10}{value}" for name, value in lines.items())


def identity() -> Identity:
    """That of the running package. Raises ValueError where it was not built as this fork."""
    from sglang.version import __version__

    return Identity.parse(__version__)
