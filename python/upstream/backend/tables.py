"""The tables of docs/rebasing.md: what other releases lack, changed or added, as the premises tell it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from packaging.version import Version

from . import fetch, premises, releases, review, uses, wheel
from .errors import ForkError
from .pin import ROOT, Pin
from .releases import Standing
from .surface import Surface

PAGE = Path("docs/rebasing.md")
_BEGIN, _END = "<!-- tables: fork.py tables -->\n", "<!-- end of tables -->\n"


def write(versions: list[str], root: Path = ROOT) -> int:
    """Try `versions` and every newer release of the index, and put their tables into docs/rebasing.md.

    Raises ForkError where a release cannot be had, or the page has no place for them.
    """
    pin = Pin.load(root)
    page = (root / PAGE).read_text(encoding="utf-8")
    place = re.compile(f"(?s){re.escape(_BEGIN)}.*?{re.escape(_END)}")
    if not place.search(page):
        raise ForkError(f"{PAGE} has no lines {_BEGIN.strip()} and {_END.strip()}")
    newer = releases.newer(pin)
    text = [f"The pin is at {pin.version}. Newer releases that the index had: {', '.join(newer) or 'none'}.\n"]
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        wheel.unpack(fetch.fetch(pin), old)
        used = uses.find(Surface(old), root)
        for version in sorted({*versions, *newer}, key=Version):
            new = Path(folder, version)
            wheel.unpack(releases.download(fetch.select(pin), version, Path(folder)), new)
            text.append(table(version, releases.judge(new, used, pin, root)))
    (root / PAGE).write_text(place.sub(lambda _: _BEGIN + "\n".join(text) + _END, page), encoding="utf-8")
    print(f"{PAGE} has the tables")
    return 0


def table(version: str, standing: Standing) -> str:
    """The section of one release: conflicts and reviews, one a row; arguments that nothing names are only counted."""
    rows = [(f.status, f"edit `{f.edit.id}`", _edit_problem(f)) for f in standing.edits if f.status != review.OK]
    rows += [(review.CONFLICT, f"file `{name}`", "upstream has it too") for name in standing.collisions]
    quiet: dict[str, list[str]] = {}
    for item in standing.premises:
        if item.field and item.status == review.REVIEW:
            quiet.setdefault(item.problem, []).append(item.name.removeprefix("argument:"))
        elif item.status != review.OK:
            rows.append((item.status, f"`{item.name}`", f"{item.problem}; {item.why}" if item.why else item.problem))
    rows.sort(key=lambda row: (row[0] != review.CONFLICT, row[1]))
    lines = [f"### {version}", ""]
    counts = [sum(row[0] == status for row in rows) for status in (review.CONFLICT, review.REVIEW)]
    lines.append(
        f"{counts[0]} conflicts and {counts[1]} reviews, beside arguments."
        if rows
        else "No conflict or review beside arguments."
    )
    if rows:
        lines += ["", "| status | premise | what |", "|---|---|---|"]
        lines += [f"| {status} | {name} | {problem} |" for status, name, problem in rows]
    for problem, label in premises.ARGUMENT_PROBLEMS.items():
        if names := quiet.get(problem):
            lines += ["", f"{label} ({len(names)}): {', '.join(f'`{name}`' for name in names)}."]
    return "\n".join(lines) + "\n"


def _edit_problem(finding: review.Finding) -> str:
    if finding.status == review.CONFLICT:
        return finding.detail.rpartition(": ")[2]
    return "upstream changed the code around it"
