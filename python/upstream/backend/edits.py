"""Edit files: reading and checking them, and recording fingerprints in them. docs/upstream.md has the format."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ForkError
from .pin import ROOT, read_toml

EDITS = Path("python/upstream/edits")
MOST_LINES = 5

_PLACES = {"before": True, "after": True, "first": False, "last": False}  # whether it needs an anchor
_REQUIRED = ("id", "scope", "where", "code", "why", "upstream", "drop_when")
_OPTIONAL = ("anchor", "fingerprint")


@dataclass(frozen=True)
class Edit:
    """One checked edit: the fields of its table, and `target`, the path of the installed file that it changes."""

    target: str
    id: str
    scope: str
    where: str
    code: str
    why: str
    upstream: str
    drop_when: str
    anchor: str = ""
    fingerprint: str = ""

    def error(self, problem: str) -> ForkError:
        """The problem, told with the edit, the file and the scope."""
        scope = f"scope {self.scope}" if self.scope else "the module scope"
        return ForkError(f"edit {self.id}: {self.target}, {scope}: {problem}")


def load(root: Path = ROOT) -> list[Edit]:
    """All edits of the repository at `root`, by file. Raises ForkError at the first that breaks the format."""
    edits = [edit for path in edit_files(root) for edit in read(path, root)]
    seen: dict[str, Edit] = {}
    for edit in edits:
        if edit.id in seen:
            raise edit.error(f"the id is taken by an edit of {seen[edit.id].target}")
        seen[edit.id] = edit
    return edits


def edit_files(root: Path = ROOT) -> list[Path]:
    return sorted((root / EDITS).rglob("*.toml"))


def read(path: Path, root: Path = ROOT) -> list[Edit]:
    """The edits of one file. Raises ForkError where it breaks the format."""
    inside = path.relative_to(root / EDITS)
    target = "sglang/" + inside.with_suffix("").as_posix()
    document = read_toml(path)
    tables = document.get("edit")
    if not isinstance(tables, list) or not tables or set(document) != {"edit"}:
        raise ForkError(f"{EDITS / inside}: it must hold [[edit]] tables and nothing else")
    return [_checked(target, number, table) for number, table in enumerate(tables, 1)]


def _checked(target: str, number: int, table: dict) -> Edit:
    name = f"edit {table.get('id') or f'number {number}'}: {target}"
    if missing := [field for field in _REQUIRED if field not in table]:
        raise ForkError(f"{name}: missing fields: {', '.join(missing)}")
    if unknown := sorted(set(table) - {*_REQUIRED, *_OPTIONAL}):
        raise ForkError(f"{name}: unknown fields: {', '.join(unknown)}")
    if wrong := [field for field, value in table.items() if not isinstance(value, str)]:
        raise ForkError(f"{name}: not text: {', '.join(wrong)}")
    edit = Edit(target, **table)
    if problem := _problem(edit):
        raise edit.error(problem)
    return edit


def _problem(edit: Edit) -> str | None:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", edit.id):
        return "the id must be lower-case words joined by '-'"
    if edit.where not in _PLACES:
        return f"where is {edit.where!r}, not one of {', '.join(_PLACES)}"
    if bool(edit.anchor.strip()) != _PLACES[edit.where]:
        return f"where = {edit.where!r} {'needs an' if _PLACES[edit.where] else 'takes no'} anchor"
    if empty := [field for field in ("why", "upstream", "drop_when") if not getattr(edit, field).strip()]:
        return f"empty fields: {', '.join(empty)}"
    if not re.match(r"https?://\S+$|none: \S", edit.upstream):
        return "upstream must be a link or 'none: reason'"
    lines = edit.code.strip("\n").splitlines()
    if len(lines) > MOST_LINES:
        return f"the code has {len(lines)} lines; at most {MOST_LINES} are allowed"
    try:
        statements = ast.parse(edit.code).body
    except (SyntaxError, ValueError) as error:
        return f"the code does not parse: {error}"
    return None if statements else "the code holds no statement"


def record(path: Path, fingerprints: dict[str, str], root: Path = ROOT) -> bool:
    """Write fingerprints, by edit id, into one file of edits and leave the rest of its text alone.

    Returns whether the file changed. Raises ForkError where the text is laid out so that this cannot be done.
    """
    text = path.read_text(encoding="utf-8")
    edits = read(path, root)
    # The odd parts are the [[edit]] lines, each followed by its table.
    parts = re.split(r"(?m)^(\[\[ *edit *\]\].*\n)", text)
    if len(parts) != 2 * len(edits) + 1:
        raise ForkError(f"{path}: cannot tell its [[edit]] tables apart")
    for number, edit in enumerate(edits, 1):
        if edit.id in fingerprints:
            parts[2 * number] = _with_fingerprint(parts[2 * number], fingerprints[edit.id])
    changed = "".join(parts)
    if changed == text:
        return False
    path.write_text(changed, encoding="utf-8")
    expected = [fingerprints.get(edit.id, edit.fingerprint) for edit in edits]
    try:
        done = [edit.fingerprint for edit in read(path, root)] == expected
    except ForkError:
        done = False
    if not done:
        path.write_text(text, encoding="utf-8")
        raise ForkError(f"{path}: cannot place the fingerprints; put an empty one into each table")
    return True


def _with_fingerprint(table: str, value: str) -> str:
    line = f'fingerprint = "{value}"'
    replaced, count = re.subn(r"(?m)^fingerprint\s*=.*$", line, table)
    if count:
        return replaced
    body = table.rstrip()
    return body + "\n" + line + (table[len(body) :] or "\n")
