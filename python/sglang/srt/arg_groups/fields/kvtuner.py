"""Config fields of the ``kvtuner`` namespace: the quantized KV cache."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from sglang.srt.arg_groups.arg_utils import A, Arg


def parse_bool(text: Any) -> bool:
    """``true``/``false`` (any case) to bool. Raises argparse.ArgumentTypeError for anything else."""
    value = str(text).strip().lower()
    if value in ("true", "false"):
        return value == "true"
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _switch(help: str) -> Arg:
    """A boolean that also takes its value as a word."""
    return Arg(
        help=f"{help} Bare, or with true or false.",
        action="store",
        action_kwargs={"nargs": "?", "const": True, "type": parse_bool, "metavar": "true|false"},
    )


class KVTuner(msgspec.Struct):
    """Namespace ``kvtuner``."""

    _NS_PATH = "kvtuner"

    enable_kvtuner_quant: A[
        bool,
        "Store the KV cache quantized and packed (KVTuner). The other --kvtuner-* flags say how.",
    ] = False
    kvtuner_nbits_key: A[
        int,
        Arg(help="Bits of a cached key element; 16 stores bfloat16.", choices=[2, 4, 8, 16]),
    ] = 4
    kvtuner_nbits_value: A[
        int,
        Arg(help="Bits of a cached value element; 16 stores bfloat16.", choices=[2, 4, 8, 16]),
    ] = 4
    kvtuner_asym: A[
        bool,
        _switch("Asymmetric quantization: store a zero point beside every scale."),
    ] = False
    kvtuner_axis_key: A[
        int,
        Arg(help="Groups of keys: 0 per token (along head_dim), 1 per channel (along tokens).", choices=[0, 1]),
    ] = 0
    kvtuner_axis_value: A[
        int,
        Arg(help="Groups of values: 0 per token (along head_dim), 1 per channel (along tokens).", choices=[0, 1]),
    ] = 0
    kvtuner_q_group_size: A[
        int,
        "Elements that share a scale; -1 for the whole head_dim (per token only).",
    ] = 64
    kvtuner_residual_length: A[
        int,
        "Newest tokens of a request that stay in full precision.",
    ] = 128
    kvtuner_sink_length: A[
        int,
        "First tokens of every sequence that stay in full precision; at most a page.",
    ] = 0
    kvtuner_hadamard_key: A[
        bool,
        _switch("Rotate keys by a Hadamard matrix before they are quantized."),
    ] = False
    kvtuner_config: A[
        str | None,
        "Per-layer bits from a KVTuner YAML preset; overrides --kvtuner-nbits-key and --kvtuner-nbits-value.",
    ] = None
