"""What all subcommands share: the loaded engine, the texts, the folder with its journal, progress."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sglang.srt.kvtuner.config.flags import KVTunerConfig
from sglang.srt.kvtuner.config.preset_header import recipe_flags
from sglang.srt.kvtuner.tuner.engine import TunerEngine
from sglang.srt.kvtuner.tuner.journal import Journal, Mix
from sglang.srt.kvtuner.tuner.recipe import FormatMaker
from sglang.srt.kvtuner.tuner.score import Quality, Scorer
from sglang.srt.kvtuner.tuner.text import TextSplit

CALIBRATION, SEARCH, FINAL = "calibration", "search", "final"


@dataclass(frozen=True)
class TuningRun:
    """An engine, a recipe (the bits of ``config`` do not matter), the texts, and the folder that results go to."""

    engine: TunerEngine
    config: KVTunerConfig
    text: TextSplit
    folder: Path

    def say(self, line: str) -> None:
        """Tell the user, beside progress bars and logs."""
        print(line, file=sys.stderr, flush=True)

    @property
    def shape(self) -> dict[str, int]:
        """What a cache format takes from the model and the engine."""
        engine = self.engine
        return dict(num_layers=engine.num_layers, head_dim=engine.head_dim, page_size=engine.settings.page_size)

    @cached_property
    def formats(self) -> FormatMaker:
        return FormatMaker(self.config, **self.shape)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What scores depend on, as plain values."""
        engine = self.engine
        return {
            **asdict(engine.settings),
            "layers": engine.num_layers,
            "head_dim": engine.head_dim,
            "recipe": recipe_flags(self.config),
            "residual_length": self.config.residual_length,
            "texts": {name: getattr(self.text, name).digest() for name in (CALIBRATION, SEARCH, FINAL)},
        }

    @cached_property
    def journal(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        return Journal(self.folder / "scores.jsonl", self.settings)

    @cached_property
    def _scorers(self) -> dict[str, Scorer]:
        return {}

    def scorer(self, text: str) -> Scorer:
        """The scorer of one of the texts."""
        if text not in self._scorers:
            self._scorers[text] = Scorer(self.engine, getattr(self.text, text))
        return self._scorers[text]

    def score(self, text: str, mix: Mix) -> Quality:
        """Quality of a mix on one of the texts, from the journal or measured and written down."""
        found = self.journal.get(text, mix)
        if found is None:
            found = self.scorer(text).score(self.formats.cache_format(mix))
            self.journal.add(text, mix, found)
        return found

    def score_all(self, text: str, mixes: list[Mix], what: str) -> dict[Mix, Quality]:
        """Qualities of many mixes, with a progress bar and the time left."""
        bar = self.progress(len(mixes), what, done=sum(self.journal.get(text, mix) is not None for mix in mixes))
        found = {}
        with bar:
            for mix in mixes:
                new = self.journal.get(text, mix) is None
                found[mix] = self.score(text, mix)
                bar.update(int(new))
        return found

    def progress(self, total: int, what: str, *, done: int = 0) -> Any:
        """A progress bar with the time left; ``done`` does not count for the speed."""
        from tqdm import tqdm

        return tqdm(total=total, initial=done, desc=what, unit="mix", dynamic_ncols=True, mininterval=1.0)
