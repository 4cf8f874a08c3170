"""Quality of a cache format on text: what the packed cache changes in the engine's next-token predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.kvtuner.tuner.engine import TunerEngine
from sglang.srt.kvtuner.tuner.text import Windows


@dataclass(frozen=True)
class Quality:
    """Means over the scored positions of a text.

    kl: Kullback-Leibler divergence of the cache format's prediction from the unquantized one, in nats. perplexity: of the text.
    top1: share of positions where both predict the same token.
    """

    kl: float
    perplexity: float
    top1: float


class Scorer:
    """Scores formats on one text. Keeps the unquantized log-probabilities of all scored positions in float32."""

    def __init__(self, engine: TunerEngine, text: Windows) -> None:
        self._engine = engine
        self._batches = text.ids.split(engine.settings.batch)
        self._reference: list[list[torch.Tensor]] | None = None

    def unquantized(self) -> Quality:
        """Quality of upstream's own cache."""
        loss = count = 0.0
        for batch, reference in zip(self._batches, self._references()):
            for logprobs, targets in zip(reference, self._targets(batch)):
                loss -= float(logprobs.gather(-1, targets[:, None]).double().sum())
                count += len(targets)
        return Quality(kl=0.0, perplexity=math.exp(loss / count), top1=1.0)

    @torch.no_grad()
    def score(self, cache_format: CacheFormat) -> Quality:
        """Run the text through a packed cache of this cache_format."""
        divergence = loss = agreed = count = 0.0
        for batch, reference in zip(self._batches, self._references()):
            found = self._engine.quantized_logits(batch, cache_format)
            for expected, logits, targets in zip(reference, found, self._targets(batch), strict=True):
                logprobs = logits.log_softmax(-1)
                divergence += float((expected.exp() * (expected - logprobs)).sum(-1).double().sum())
                loss -= float(logprobs.gather(-1, targets[:, None]).double().sum())
                agreed += int((logprobs.argmax(-1) == expected.argmax(-1)).sum())
                count += len(targets)
        # Rounding can take a divergence of nothing a little below zero.
        return Quality(kl=max(divergence / count, 0.0), perplexity=math.exp(loss / count), top1=agreed / count)

    def _references(self) -> list[list[torch.Tensor]]:
        if self._reference is None:
            with torch.no_grad():
                self._reference = [
                    [logits.log_softmax(-1) for logits in self._engine.reference_logits(batch)]
                    for batch in self._batches
                ]
        return self._reference

    def _targets(self, batch: torch.Tensor) -> list[torch.Tensor]:
        columns = self._engine.scored_columns()
        device = self._engine.device
        return [batch[:, [c + 1 for c in chunk]].flatten().to(device) for chunk in columns]
