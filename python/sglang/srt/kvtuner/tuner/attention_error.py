"""What quantized keys and values do to one layer's attention output, for all candidates in one pass over the text.

While the unquantized model runs, each layer's own queries, keys and values are at hand. Per candidate, keys and values
are quantized and dequantized as the packed cache stores them, the attention output is computed with exactly what the
cache would show a query (packed pages for old tokens, full precision for sinks, the residual window and its chunk), and
compared with the unquantized output. Layers before it are unquantized: the error is the layer's own.
Source: KVTuner (arXiv 2502.04420), layer-wise sensitivity by relative attention output error.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang.srt.kvtuner.config.flags import KVTunerConfig
from sglang.srt.kvtuner.config.preset import LayerBits
from sglang.srt.kvtuner.format.formats import SCALE_DTYPE
from sglang.srt.kvtuner.format.hadamard import block_size, rotate
from sglang.srt.kvtuner.format.quantizer import quantize
from sglang.srt.kvtuner.tuner.engine import EngineSettings, TunerEngine
from sglang.srt.kvtuner.tuner.recipe import ALL_PAIRS
from sglang.srt.kvtuner.tuner.text import Windows

# Per recipe, per layer: pair of bits to relative error.
ErrorTable = dict[KVTunerConfig, list[dict[LayerBits, float]]]


def measure_errors(engine: TunerEngine, text: Windows, recipes: tuple[KVTunerConfig, ...]) -> ErrorTable:
    """Relative attention-output errors ``|o - o'| / |o|`` of every layer, pair and recipe.

    Norms run over all heads and scored positions of the text. All recipes must have one residual and one sink length.
    """
    probe = _Probe(engine.settings, recipes)
    for batch in text.ids.split(engine.settings.batch):
        engine.probe(batch, probe.observe)
    layers = range(engine.num_layers)
    return {
        recipe: [{pair: probe.relative_error(layer, recipe, pair) for pair in ALL_PAIRS} for layer in layers]
        for recipe in recipes
    }


@dataclass(frozen=True)
class _Side:
    """How keys or values alone are stored; recipes share what they have in common."""

    nbits: int
    asym: bool
    axis: int
    group_size: int
    rotated: bool = False

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        if self.rotated:
            block = block_size(x.shape[-1])
            return rotate(replace(self, rotated=False).stored(rotate(x, block)), block)
        return quantize(
            x,
            nbits=self.nbits,
            asym=self.asym,
            axis=self.axis,
            group_size=self.group_size,
            scale_dtype=SCALE_DTYPE,
        ).dequantize()


class _Probe:
    def __init__(self, settings: EngineSettings, recipes: tuple[KVTunerConfig, ...]) -> None:
        self._rows = torch.arange(settings.chunk + settings.stride - 1, settings.window, settings.stride)
        column = torch.arange(settings.window)
        chunk_start = self._rows // settings.chunk * settings.chunk
        packed_end = (chunk_start - recipes[0].residual_length) // settings.page_size * settings.page_size
        self._causal = column <= self._rows[:, None]
        self._packed = (column >= recipes[0].sink_length) & (column < packed_end[:, None])
        self._recipes = recipes
        self._squares: dict[tuple, float] = defaultdict(float)

    def relative_error(self, layer: int, recipe: KVTunerConfig, pair: LayerBits) -> float:
        key, value = _sides(recipe, pair)
        return (self._squares[layer, key, value] / self._squares[layer, None, None]) ** 0.5

    @torch.no_grad()
    def observe(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, tokens, head_dim]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        self._add_errors(q.float(), k.float(), v.float(), layer, scaling)
        return out.transpose(1, 2)

    def _add_errors(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scaling: float) -> None:
        kv_heads, rows = k.shape[1], self._rows.to(q.device)
        packed, causal = self._packed.to(q.device), self._causal.to(q.device)
        q = q[:, :, rows].unflatten(1, (kv_heads, -1)) * scaling  # [batch, kv_heads, queries per head, rows, head_dim]

        def logits(keys: torch.Tensor) -> torch.Tensor:
            return q @ keys.unsqueeze(2).transpose(-1, -2)

        def weights(scores: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill(~causal, float("-inf")).softmax(-1)

        v = v.unsqueeze(2)
        exact = logits(k)
        reference = weights(exact) @ v
        self._squares[layer, None, None] += float(reference.double().square().sum())
        candidates = {_sides(recipe, pair) for recipe in self._recipes for pair in ALL_PAIRS}
        stored_values = {side: side.stored(v) for side in {value for _, value in candidates}}
        for key in {key for key, _ in candidates}:
            p = weights(torch.where(packed, logits(key.stored(k)), exact))
            near, far = (p * ~packed) @ v - reference, p * packed
            for value in {value for other, value in candidates if other == key}:
                error = near + far @ stored_values[value]
                self._squares[layer, key, value] += float(error.double().square().sum())


def _sides(recipe: KVTunerConfig, pair: LayerBits) -> tuple[_Side, _Side]:
    return (
        _Side(pair.key, recipe.asym, recipe.axis_key, recipe.group_size, recipe.hadamard_key),
        _Side(pair.value, recipe.asym, recipe.axis_value, recipe.group_size),
    )
