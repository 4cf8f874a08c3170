"""Text for calibration, search and final evaluation: three disjoint lists of token windows.

Sources: ``builtin`` (sample.txt beside this file), a text file, or a Hugging Face data set as NAME, NAME:CONFIG or
NAME:CONFIG:SPLIT (its column ``text`` or ``content``), where NAME may be a local folder of one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang.srt.kvtuner.tuner.errors import TuningError

BUILTIN = "builtin"
_COLUMNS = ("text", "content")
_MOST_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class Windows:
    """Token ids, int64 [count, window]."""

    ids: torch.Tensor

    def digest(self) -> str:
        """SHA-256 (hex, 16 digits) of the ids."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class TextSplit:
    """calibration: what sensitivity and pruning see. search: what the search scores on. final: what neither saw."""

    calibration: Windows
    search: Windows
    final: Windows


def split_text(
    tokenizer: Any, source: str, eval_source: str | None, *, counts: tuple[int, int, int], window: int
) -> TextSplit:
    """Cut ``source`` into consecutive windows: the first for calibration, the next for search, the next for the final
    evaluation, unless that has a text of its own (``eval_source``).

    counts: windows of the three. Raises TuningError for text that is missing, empty or too short, and for windows that
    occur in two of them.
    """
    own_final = eval_source is not None
    needed = counts[:2] if own_final else counts
    parts = _cut(tokenizer, "--text", source, needed, window)
    if own_final:
        parts += _cut(tokenizer, "--eval-text", eval_source, counts[2:], window)
    seen: set[tuple] = set()
    for name, part in zip(("calibration", "search", "final evaluation"), parts):
        for row in part.ids.tolist():
            if tuple(row) in seen:
                raise TuningError(
                    f"--text {source}{f' and --eval-text {eval_source}' if own_final else ''}: a window of the {name} "
                    "text occurs in an earlier part too; the texts must be disjoint"
                )
        seen.update(map(tuple, part.ids.tolist()))
    return TextSplit(*parts)


def _cut(tokenizer: Any, flag: str, source: str, counts: tuple[int, ...], window: int) -> list[Windows]:
    text = read_source(flag, source)
    ids = tokenizer.encode(text, add_special_tokens=False)
    needed = sum(counts) * window
    if len(ids) < needed:
        raise TuningError(
            f"{flag} {source} has {len(ids)} tokens; {needed} are needed ({' + '.join(map(str, counts))} windows of "
            f"{window}). Give a longer text, or fewer or shorter windows"
        )
    rows = torch.tensor(ids[:needed], dtype=torch.int64).view(-1, window)
    return [Windows(part) for part in rows.split(list(counts))]


def read_source(flag: str, source: str) -> str:
    """The text of a source. Raises TuningError, naming the flag, where there is none."""
    if source == BUILTIN:
        text = (Path(__file__).parent / "sample.txt").read_text(encoding="utf-8")
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TuningError(f"{flag} {source}: cannot be read: {error}") from error
    else:
        text = _read_dataset(flag, source)
    if not text.strip():
        raise TuningError(f"{flag} {source} is empty")
    return text


def _read_dataset(flag: str, source: str) -> str:
    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        import datasets

        rows = datasets.load_dataset(name, config or None, split=split or "test", streaming=True)
        parts, size = [], 0
        for row in rows:
            column = next((c for c in _COLUMNS if c in row), None)
            if column is None:
                raise TuningError(
                    f"{flag} {source}: the data set's columns are {', '.join(row)}; {' or '.join(_COLUMNS)} is needed"
                )
            parts.append(row[column])
            size += len(row[column])
            if size > _MOST_CHARACTERS:
                break
    except TuningError:
        raise
    except Exception as error:
        raise TuningError(
            f"{flag} {source}: no such file, and no such Hugging Face data set can be loaded ({error}); valid are "
            f"{BUILTIN}, a text file, or NAME[:CONFIG[:SPLIT]]"
        ) from error
    return "\n\n".join(parts)
