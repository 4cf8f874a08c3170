"""The `--kvtuner-*` flags as one frozen, checked object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.kvtuner.format.quantizer import PER_CHANNEL, STORED_BITS

FLAG_OF_FIELD = {
    "kvtuner_nbits_key": "--kvtuner-nbits-key",
    "kvtuner_nbits_value": "--kvtuner-nbits-value",
    "kvtuner_asym": "--kvtuner-asym",
    "kvtuner_axis_key": "--kvtuner-axis-key",
    "kvtuner_axis_value": "--kvtuner-axis-value",
    "kvtuner_q_group_size": "--kvtuner-q-group-size",
    "kvtuner_residual_length": "--kvtuner-residual-length",
    "kvtuner_sink_length": "--kvtuner-sink-length",
    "kvtuner_hadamard_key": "--kvtuner-hadamard-key",
    "kvtuner_config": "--kvtuner-config",
}


# Tokens of a page where --page-size is not given.
DEFAULT_PAGE_SIZE = 64


class KVTunerConfigError(ValueError):
    """A flag or preset that cannot work; the message names it, the value, and what would be valid."""


@dataclass(frozen=True)
class KVTunerConfig:
    """What the flags say, independent of the model.

    nbits_key, nbits_value: 2, 4, 8, or 16 for bfloat16; per-layer presets override them. asym: store zero points.
    axis_key, axis_value: 0 per token, 1 per channel. group_size: elements that share a scale, -1 for the whole
    head_dim. residual_length, sink_length: newest and first tokens kept in full precision. hadamard_key: rotate keys
    before they are quantized; per-layer presets may override it. preset: path of a per-layer YAML preset, or None.
    """

    nbits_key: int = 4
    nbits_value: int = 4
    asym: bool = False
    axis_key: int = 0
    axis_value: int = 0
    group_size: int = 64
    residual_length: int = 128
    sink_length: int = 0
    hadamard_key: bool = False
    preset: str | None = None

    def __post_init__(self) -> None:
        _check_choice("--kvtuner-nbits-key", self.nbits_key, STORED_BITS)
        _check_choice("--kvtuner-nbits-value", self.nbits_value, STORED_BITS)
        _check_choice("--kvtuner-axis-key", self.axis_key, (0, 1))
        _check_choice("--kvtuner-axis-value", self.axis_value, (0, 1))
        _check_choice("--kvtuner-asym", self.asym, (True, False))
        _check_choice("--kvtuner-hadamard-key", self.hadamard_key, (True, False))
        _check_integer("--kvtuner-q-group-size", self.group_size)
        _check_integer("--kvtuner-residual-length", self.residual_length)
        _check_integer("--kvtuner-sink-length", self.sink_length)
        if self.group_size != -1 and self.group_size <= 0:
            raise KVTunerConfigError(
                f"--kvtuner-q-group-size is {self.group_size}; valid are positive group sizes, "
                "or -1 for the whole head_dim"
            )
        for flag, axis in (("--kvtuner-axis-key", self.axis_key), ("--kvtuner-axis-value", self.axis_value)):
            if axis == PER_CHANNEL and self.group_size == -1:
                raise KVTunerConfigError(
                    f"--kvtuner-q-group-size is -1 with {flag} 1; per-channel groups run along the tokens of a "
                    "page, so give a group size that divides --page-size (64 by default)"
                )
        for flag, length in (
            ("--kvtuner-residual-length", self.residual_length),
            ("--kvtuner-sink-length", self.sink_length),
        ):
            if length < 0:
                raise KVTunerConfigError(f"{flag} is {length}; valid are 0 and above")

    @classmethod
    def from_args(cls, args: Any) -> KVTunerConfig:
        """Read the flags from ServerArgs, a resolving view, or the published ``kvtuner`` namespace.

        Raises KVTunerConfigError for a value that cannot work.
        """
        return cls(
            nbits_key=args.kvtuner_nbits_key,
            nbits_value=args.kvtuner_nbits_value,
            asym=args.kvtuner_asym,
            axis_key=args.kvtuner_axis_key,
            axis_value=args.kvtuner_axis_value,
            group_size=args.kvtuner_q_group_size,
            residual_length=args.kvtuner_residual_length,
            sink_length=args.kvtuner_sink_length,
            hadamard_key=args.kvtuner_hadamard_key,
            preset=args.kvtuner_config,
        )


def _check_choice(flag: str, value: Any, choices: tuple) -> None:
    # Without the type check `True` would pass for an axis of 1, and 4.0 for 4 bits.
    if type(value) is not type(choices[0]) or value not in choices:
        raise KVTunerConfigError(f"{flag} is {value!r}; valid are {', '.join(map(str, choices))}")


def _check_integer(flag: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise KVTunerConfigError(f"{flag} is {value!r}; an integer is needed")
