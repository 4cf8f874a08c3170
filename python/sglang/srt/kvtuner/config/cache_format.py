"""The cache format: one frozen object that says what every layer of the cache stores."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from sglang.srt.kvtuner.config.flags import KVTunerConfig, KVTunerConfigError
from sglang.srt.kvtuner.config.preset import LayerBits, load_preset
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.hadamard import block_size
from sglang.srt.kvtuner.format.layout import codes_per_byte
from sglang.srt.kvtuner.format.quantizer import PER_TOKEN, UNQUANTIZED_BITS


@dataclass(frozen=True)
class CacheFormat:
    """Formats of all layers (global layer order), page size in tokens, and how many of the newest tokens stay in full
    precision."""

    layers: tuple[LayerFormat, ...]
    page_size: int
    residual_length: int

    @property
    def ring_length(self) -> int:
        """Full-precision tokens kept per request: the window plus the unfinished page, in whole pages."""
        pages = -(-self.residual_length // self.page_size) + 1
        return pages * self.page_size

    def nominal_bits(self) -> tuple[float, float]:
        """Average bits of K and of V over layers, without scales and zero points."""
        count = len(self.layers)
        return (
            sum(layer.key.nbits for layer in self.layers) / count,
            sum(layer.value.nbits for layer in self.layers) / count,
        )

    def stored_bits(self) -> tuple[float, float]:
        """Average stored bits per element of K and of V in packed pages over layers, scales and zero points included."""
        count = len(self.layers)
        return (
            sum(layer.key.stored_bits for layer in self.layers) / count,
            sum(layer.value.stored_bits for layer in self.layers) / count,
        )

    def settings(self) -> dict[str, Any]:
        """The cache format as plain values: what ranks compare, and what :meth:`digest` hashes."""
        return {
            "page_size": self.page_size,
            "residual_length": self.residual_length,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def digest(self) -> str:
        """SHA-256 (hex) of :meth:`settings`."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """One line for the log."""
        kinds = sorted({f"K{layer.key.nbits}V{layer.value.nbits}" for layer in self.layers})
        keys, values = [layer.key for layer in self.layers], [layer.value for layer in self.layers]
        quantized = [fmt for fmt in (*keys, *values) if fmt.quantized]
        symmetry = [("asymmetric" if quantized[0].asym else "symmetric")] if quantized else []
        return ", ".join(
            [
                f"{len(self.layers)} layers {'/'.join(kinds)}",
                *symmetry,
                f"K {_describe_groups(keys)}",
                f"V {_describe_groups(values)}",
                f"page {self.page_size}",
                f"residual {self.residual_length}",
                *_describe_sinks([layer.sink_length for layer in self.layers]),
            ]
        )


def build_cache_format(
    config: KVTunerConfig, *, num_layers: int, head_dim: int, page_size: int, kv_heads: int | None = None
) -> CacheFormat:
    """Resolve the flags for a model of ``num_layers`` layers with ``head_dim`` elements per head and ``kv_heads`` KV heads
    over all ranks, which per-head presets are checked against (None: not known).

    Raises KVTunerConfigError, naming the flag, where the model and the flags do not fit.
    """
    bits = _layer_bits(config, num_layers, kv_heads)

    def tensor(which: str, nbits: int, axis: int, token_lanes: bool, rotated: bool = False) -> TensorFormat:
        if nbits == UNQUANTIZED_BITS:
            return TensorFormat.unquantized(page_size, head_dim, token_lanes)
        group = _group_size(config, which, axis, head_dim, page_size)
        if head_dim % codes_per_byte(nbits):
            raise KVTunerConfigError(
                f"--kvtuner-nbits-{which} is {nbits}: the model's head_dim {head_dim} does not fill whole bytes at "
                "that width"
            )
        return TensorFormat(
            nbits=nbits,
            asym=config.asym,
            axis=axis,
            group_size=group,
            page_size=page_size,
            head_dim=head_dim,
            token_lanes=token_lanes,
            hadamard=_hadamard_block(head_dim) if rotated else 0,
        )

    layers = tuple(
        LayerFormat(
            key=tensor("key", b.key, config.axis_key, True, b.hadamard_key),
            value=tensor("value", b.value, config.axis_value, False),
            sink_length=b.sink_length,
        )
        for b in bits
    )
    _refuse_sinks_beyond_a_page(config, bits, page_size)
    return CacheFormat(layers=layers, page_size=page_size, residual_length=config.residual_length)


def _describe_groups(formats: list[TensorFormat]) -> str:
    """How the layers that quantize do it: of this, presets change rotation alone."""
    quantized = [fmt for fmt in formats if fmt.quantized]
    if not quantized:
        return "bfloat16"
    described = f"{'per token' if quantized[0].axis == PER_TOKEN else 'per channel'} g{quantized[0].group_size}"
    rotated = sum(fmt.hadamard > 0 for fmt in quantized)
    if rotated:
        described += " rotated" if rotated == len(formats) else f" rotated in {rotated} layers"
    return described


def _describe_sinks(lengths: list[int]) -> list[str]:
    kept = sorted(length for length in lengths if length)
    if not kept:
        return []
    count = str(kept[0]) if kept[0] == kept[-1] else f"{kept[0]} to {kept[-1]}"
    return [f"sinks {count}" + ("" if len(kept) == len(lengths) else f" in {len(kept)} layers")]


def _layer_bits(config: KVTunerConfig, num_layers: int, kv_heads: int | None) -> tuple[LayerBits, ...]:
    if config.preset is None:
        return (LayerBits(config.nbits_key, config.nbits_value, config.hadamard_key, config.sink_length),) * num_layers
    bits = load_preset(
        config.preset, hadamard_key=config.hadamard_key, sink_length=config.sink_length, kv_heads=kv_heads
    )
    if len(bits) != num_layers:
        raise KVTunerConfigError(
            f"--kvtuner-config {config.preset}: the preset has {len(bits)} layers, the model has {num_layers}"
        )
    return bits


def _refuse_sinks_beyond_a_page(config: KVTunerConfig, bits: tuple[LayerBits, ...], page_size: int) -> None:
    lengths = [("--kvtuner-sink-length", config.sink_length)]
    if config.preset is not None:
        of_layer = f"--kvtuner-config {config.preset}: sink_length of layer"
        lengths += [(f"{of_layer} {i}", layer.sink_length) for i, layer in enumerate(bits)]
    for what, length in lengths:
        if length > page_size:
            raise KVTunerConfigError(f"{what} is {length}; valid are 0 to {page_size}, one page (--page-size)")


def _hadamard_block(head_dim: int) -> int:
    block = block_size(head_dim)
    if block == 1:
        raise KVTunerConfigError(
            f"--kvtuner-hadamard-key, or hadamard_key of a layer in --kvtuner-config, is true: the model's head_dim "
            f"{head_dim} is odd, and rotated are blocks of channels whose size is a power of two that divides it"
        )
    return block


def _group_size(config: KVTunerConfig, which: str, axis: int, head_dim: int, page_size: int) -> int:
    group = config.group_size
    if axis == PER_TOKEN:
        group = head_dim if group == -1 else group
        if head_dim % group:
            raise KVTunerConfigError(
                f"--kvtuner-q-group-size is {group} with --kvtuner-axis-{which} 0; per-token groups must divide the "
                f"model's head_dim {head_dim} (valid: {_divisors(head_dim)}, or -1 for all of it)"
            )
    elif page_size % group:
        raise KVTunerConfigError(
            f"--kvtuner-q-group-size is {group} with --kvtuner-axis-{which} 1; per-channel groups must divide the "
            f"page, --page-size {page_size} (valid: {_divisors(page_size)})"
        )
    return group


def _divisors(n: int) -> str:
    """Divisors from 8 on, at a cost of the square root: head_dim comes from a model's file and may be anything."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return ", ".join(str(d) for d in sorted({*small, *(n // d for d in small)}) if d >= 8)
