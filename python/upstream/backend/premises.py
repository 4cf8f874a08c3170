"""What the fork takes for granted of upstream, as it was reviewed, and judging a release by it. docs/rebasing.md has more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from .definitions import Found
from .errors import ForkError
from .pin import ROOT, Pin, read_toml
from .review import CONFLICT, OK, REVIEW
from .surface import Surface
from .uses import Use

PREMISES = Path("python/upstream/premises.toml")

_NEW = "a new argument: must the quantized cache refuse it?"
_OTHER = "another type or default"
_GONE = "gone; nothing of ours names it"
# What can be told of a field of ServerArgs, and how a table calls it.
ARGUMENT_PROBLEMS = {
    _NEW: "New arguments",
    _OTHER: "Arguments with another type or default",
    _GONE: "Arguments that are gone, and that own code does not name",
}

_HEAD = """\
# What this fork takes for granted of upstream, as it was last reviewed. `fork.py record` writes this file; docs/rebasing.md
# explains it. A fingerprint is empty where only being there counts.
"""
_ARGUMENTS = """
# Every field of ServerArgs by type and default: a new one may be a feature that the quantized cache must refuse.
"""


@dataclass
class Record:
    """The reviewed state. release: of upstream. used: fingerprints by name. arguments: those of ServerArgs' fields."""

    release: str = ""
    used: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Path = ROOT) -> Record:
        """The record of the repository at `root`, empty where there is none. Raises ForkError where it is damaged."""
        if not (root / PREMISES).exists():
            return cls()
        table = read_toml(root / PREMISES)
        try:
            used = {name: entry["fingerprint"] for name, entry in table["used"].items()}
            return cls(table["release"], used, table["arguments"])
        except (KeyError, TypeError, AttributeError):
            raise ForkError(f"{PREMISES} is damaged: take it from the repository again") from None

    def save(self, uses: dict[str, Use], root: Path = ROOT) -> bool:
        """Write the record, with the reasons that `uses` has. Returns whether the file changed."""
        lines = [f"release = {json.dumps(self.release)}", "", "[used]"]
        for name in sorted(self.used):
            why = uses[name].why if name in uses else ""
            lines.append(f"{_text(name)} = {{ fingerprint = {json.dumps(self.used[name])}, why = {_text(why)} }}")
        lines += [_ARGUMENTS.rstrip("\n"), "[arguments]"]
        lines += [f"{name} = {json.dumps(self.arguments[name])}" for name in sorted(self.arguments)]
        text = _HEAD + "\n".join(lines) + "\n"
        path = root / PREMISES
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return False
        path.write_text(text, encoding="utf-8")
        return True


@dataclass(frozen=True)
class Judged:
    """What became of one premise: `new` where this repository changed rather than upstream, `field` for one of all arguments."""

    name: str
    status: str
    problem: str = ""
    why: str = ""
    new: bool = False
    field: bool = False
    found: Found | None = None

    @property
    def detail(self) -> str:
        return f"{self.name}: {self.problem}" + (f" ({self.why})" if self.why else "")


def judge(uses: dict[str, Use], record: Record, surface: Surface) -> list[Judged]:
    """Compare everything that is used, and all arguments, with the record."""
    judged = [_use(use, record, surface) for _, use in sorted(uses.items())]
    judged += [
        Judged(name, REVIEW, "nothing uses it any more", new=True) for name in sorted(set(record.used) - set(uses))
    ]
    for name in sorted({*record.arguments, *surface.arguments}):
        judged.append(_argument(name, uses.get(f"argument:{name}"), record, surface))
    return judged


def _use(use: Use, record: Record, surface: Surface) -> Judged:
    found = surface.find(use.name)
    if found is None:
        return Judged(use.name, CONFLICT, "missing", use.why)
    if refused := _refused(found, use.passes):
        return Judged(use.name, CONFLICT, f"takes no {', '.join(refused)}", use.why, found=found)
    if use.name not in record.used:
        return Judged(use.name, REVIEW, "not recorded", use.why, new=True, found=found)
    if record.used[use.name] != found.fingerprint:
        return Judged(use.name, REVIEW, "changed", use.why, found=found)
    return Judged(use.name, OK, found=found)


def _argument(name: str, use: Use | None, record: Record, surface: Surface) -> Judged:
    found, shown, why = surface.arguments.get(name), f"argument:{name}", use.why if use else ""
    if found is None:
        # One that own code names is reported as missing already.
        return Judged(shown, OK if use else REVIEW, _GONE, field=True)
    if name not in record.arguments:
        # Without any, this is the first record.
        return Judged(shown, REVIEW, _NEW, why, not record.arguments, True, found)
    if record.arguments[name] != found.fingerprint:
        return Judged(shown, REVIEW, _OTHER, why, field=True, found=found)
    return Judged(shown, OK, field=True, found=found)


def _refused(found: Found, passes: Iterable[str]) -> list[str]:
    """The arguments in `passes` that a function does not take by name."""
    if found.function is None or found.function.args.kwarg:
        return []
    arguments = found.function.args
    return sorted(set(passes) - {a.arg for a in (*arguments.args, *arguments.kwonlyargs)})


def accept(judged: list[Judged], record: Record, patterns: list[str]) -> Record:
    """The record with every review that is this repository's own, or matches a pattern, accepted."""
    used, arguments = dict(record.used), dict(record.arguments)
    for item in judged:
        if item.status != REVIEW or not (item.new or matches(item.name, patterns)):
            continue
        table, key = (arguments, item.name.removeprefix("argument:")) if item.field else (used, item.name)
        if item.found is None:
            table.pop(key, None)
        else:
            table[key] = item.found.fingerprint
    return Record(record.release, used, arguments)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` is one of `patterns`, in which `*` stands for anything."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_reviewed(pin: Pin, root: Path = ROOT) -> None:
    """Raises ForkError where the pinned release is not the one that the premises were reviewed on."""
    record = Record.load(root)
    if record.release != pin.version:
        reviewed = f"on {record.release}" if record.release else "on no release"
        raise ForkError(
            f"{PREMISES}: what the fork takes for granted was reviewed {reviewed}, the pin is {pin.version}: "
            "run fork.py check, and fork.py record for each finding"
        )


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
