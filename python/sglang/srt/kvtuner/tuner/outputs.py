"""Tables and presets that a run leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang.srt.kvtuner.config.preset import LayerBits
from sglang.srt.kvtuner.config.preset_header import format_header
from sglang.srt.kvtuner.tuner.score import Quality

QUALITY_HEAD = ("KL", "perplexity", "top-1 agreement")


def quality_cells(quality: Quality) -> tuple[str, str, str]:
    """A quality as cells of a table."""
    return f"{quality.kl:.5f}", f"{quality.perplexity:.3f}", f"{100 * quality.top1:.1f} %"


def text_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table in aligned columns; the first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def row(cells: tuple[str, ...]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([row(head), row(tuple(rule)), *map(row, lines[1:])]) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a run that is killed leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_json(path: Path, content: Any) -> None:
    """As :func:`write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_preset(path: Path, mix: tuple[LayerBits, ...], header: dict[str, str]) -> None:
    """Write a preset in KVTuner's YAML format, for ``--kvtuner-config``, with a header of comments.

    Layers with rotated keys or sinks say so, which extends the format (preset.py).
    """
    layers = [
        f"{i}:\n  nbits_key: {pair.key}\n  nbits_value: {pair.value}\n"
        + ("  hadamard_key: true\n" if pair.hadamard_key else "")
        + (f"  sink_length: {pair.sink_length}\n" if pair.sink_length else "")
        for i, pair in enumerate(mix)
    ]
    write_text(path, format_header(header) + "".join(layers))
