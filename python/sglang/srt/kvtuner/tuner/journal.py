"""The search's memory: every score on disk as soon as it is known, so that a killed run loses at most one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang.srt.kvtuner.config.preset import LayerBits
from sglang.srt.kvtuner.tuner.errors import TuningError
from sglang.srt.kvtuner.tuner.recipe import parse_pair
from sglang.srt.kvtuner.tuner.score import Quality

Mix = tuple[LayerBits, ...]


class Journal:
    """Qualities by text and mix, in a file of one JSON object per line.

    The first line holds the settings that the scores depend on (plain values). Raises TuningError when the file was
    written with other settings, naming the first that differs.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._scores: dict[tuple[str, Mix], Quality] = {}
        settings = json.loads(json.dumps(settings))
        if path.exists() and path.stat().st_size:
            self._read(settings)
        else:
            self._append({"settings": settings})

    def get(self, text: str, mix: Mix) -> Quality | None:
        """The quality of a mix on the text of that name, or None."""
        return self._scores.get((text, mix))

    def add(self, text: str, mix: Mix, quality: Quality) -> None:
        """Write a score down."""
        self._scores[text, mix] = quality
        self._append({"text": text, "mix": " ".join(map(str, mix)), **asdict(quality)})

    def _read(self, settings: dict[str, Any]) -> None:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # killed in the middle of a line
            self._path.write_bytes(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self._append({"settings": settings})
            return
        before = lines[0]["settings"]
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                raise TuningError(
                    f"--out {self._path.parent} holds a run with {name} {before.get(name)!r}, this one has "
                    f"{settings.get(name)!r}; give another folder, or the same settings to go on"
                )
        for line in lines[1:]:
            mix = tuple(map(parse_pair, line["mix"].split()))
            self._scores[line["text"], mix] = Quality(line["kl"], line["perplexity"], line["top1"])

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
