"""The one table of the `--kvtuner-*` flags, and what they say as one frozen, checked object.

Every field of :class:`KVTunerConfig` declares its flag: type, default, help text and valid values. From these entries
(:data:`FLAGS`) come the fields of ServerArgs (arg_groups/fields/kvtuner.py), the checks here, the options of a preset's
layer (preset.py), the tuner's arguments, and the table in README.md, which ``python -m sglang.srt.kvtuner.config.flags``
prints.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_type_hints

from sglang.srt.kvtuner.format.quantizer import PER_CHANNEL, STORED_BITS

# The attention backend in upstream's registry, and the fields of upstream's flags that may name it.
ATTENTION_BACKEND = "kvtuner"
ATTENTION_BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
# Tokens of a page where --page-size is not given.
DEFAULT_PAGE_SIZE = 64
# Far above every useful value, and small enough for what is computed from it.
LARGEST_INTEGER = 2**31 - 1
# Tokens of the workspace of prefills. At the largest, 16,384 elements of a token stay within the 32 bits of upstream's kernel.
DEFAULT_WORKSPACE_TOKENS = 16_384
SMALLEST_WORKSPACE, LARGEST_WORKSPACE = 1024, 131_072


class KVTunerConfigError(ValueError):
    """A flag or preset that cannot work; the message names it, the value, and what would be valid."""


@dataclass(frozen=True)
class Flag:
    """One flag.

    field: of ServerArgs. attribute: of KVTunerConfig. type: int, bool or str. default: of both. help: for command line
    and documentation. valid: the valid values in words, for messages and documentation. choices: all valid integers.
    minimum, maximum: the smallest and the largest valid integer. also: one more valid integer. optional: None is valid.
    recipe: it says how codes are made and what stays in full precision, which the tuner takes as an argument. layered: layers
    of a preset may say it, too.
    """

    field: str
    attribute: str
    type: type
    default: Any
    help: str
    valid: str
    choices: tuple[int, ...] = ()
    minimum: int = 0
    maximum: int = LARGEST_INTEGER
    also: int | None = None
    optional: bool = False
    recipe: bool = True
    layered: bool = False

    @property
    def name(self) -> str:
        """As users write it: ``--kvtuner-nbits-key``."""
        return "--" + self.field.replace("_", "-")

    def accepts(self, value: object) -> bool:
        """Whether the value has the flag's very type (True is no 1, and 4.0 no 4) and lies in its range."""
        if type(value) is not self.type:
            return self.optional and value is None
        if not isinstance(value, int) or isinstance(value, bool):
            return True
        if self.choices:
            return value in self.choices
        return self.minimum <= value <= self.maximum or value == self.also

    def check(self, value: object) -> None:
        """Raise KVTunerConfigError for a value that the flag does not accept."""
        if not self.accepts(value):
            string = ", a string" if isinstance(value, str) else ""
            raise KVTunerConfigError(f"{self.name} is {shown(value)}{string}; valid are {self.valid}")

    def argument(self) -> dict[str, Any]:
        """Keyword arguments of argparse's add_argument, without a default."""
        if self.type is bool:
            help = f"{self.help} Bare, or with true or false."
            return {"help": help, "nargs": "?", "const": True, "type": parse_bool, "metavar": "true|false"}
        return {"help": self.help, "type": self.type, "choices": list(self.choices) or None}


def shown(value: object, limit: int = 200) -> str:
    """repr() for messages: on one line, clipped to ``limit`` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        text = "an integer of thousands of digits"
    return text if len(text) <= limit else text[:limit] + "..."


def parse_bool(text: object) -> bool:
    """``true``/``false`` (any case) to bool. Raises argparse.ArgumentTypeError for anything else."""
    value = str(text).strip().lower()
    if value in ("true", "false"):
        return value == "true"
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _flag(default: object, help: str, **entry: object) -> Any:
    """A dataclass field that declares a flag; ``entry`` are fields of :class:`Flag` that do not follow from it."""
    return dataclasses.field(default=default, metadata={"help": help, **entry})


def _switch(help: str, **entry: object) -> Any:
    return _flag(False, help, valid="true, false", **entry)


def _choice(default: int, help: str, choices: tuple[int, ...], **entry: object) -> Any:
    return _flag(default, help, valid=", ".join(map(str, choices)), choices=choices, **entry)


@dataclass(frozen=True)
class KVTunerConfig:
    """What the flags say, independent of the model; each field's help text says what it means.

    Raises KVTunerConfigError for a value that cannot work.
    """

    nbits_key: int = _choice(
        4, "Bits of a cached key element; 16 stores bfloat16.", STORED_BITS, recipe=False, layered=True
    )
    nbits_value: int = _choice(
        4, "Bits of a cached value element; 16 stores bfloat16.", STORED_BITS, recipe=False, layered=True
    )
    asym: bool = _switch("Asymmetric quantization: store a zero point beside every scale.")
    axis_key: int = _choice(0, "Groups of keys: 0 per token (along head_dim), 1 per channel (along tokens).", (0, 1))
    axis_value: int = _choice(
        0, "Groups of values: 0 per token (along head_dim), 1 per channel (along tokens).", (0, 1)
    )
    group_size: int = _flag(
        64,
        "Elements that share a scale; -1 for the whole head_dim (per token only).",
        field="kvtuner_q_group_size",
        valid="divisors of head_dim (per token) or of the page (per channel), or -1 for the whole head_dim",
        minimum=1,
        also=-1,
    )
    residual_length: int = _flag(
        128,
        "Newest tokens of a request that stay in full precision.",
        valid=f"integers from 0 to {LARGEST_INTEGER}",
    )
    sink_length: int = _flag(
        0,
        "First tokens of every sequence that stay in full precision; at most a page.",
        valid="integers from 0 to a page",
        layered=True,
    )
    hadamard_key: bool = _switch(
        "Rotate keys by a Hadamard matrix before they are quantized; ruins models whose keys have a large bias.",
        layered=True,
    )
    preset: str | None = _flag(
        None,
        "Per-layer bits from a KVTuner YAML preset; overrides --kvtuner-nbits-key and --kvtuner-nbits-value.",
        field="kvtuner_config",
        valid="paths of a YAML file",
        recipe=False,
    )
    workspace_tokens: int = _flag(
        DEFAULT_WORKSPACE_TOKENS,
        "Tokens that a prefill on a GPU dequantizes at once; longer prefixes come in rounds. No effect on a CPU.",
        valid=f"integers from {SMALLEST_WORKSPACE} to {LARGEST_WORKSPACE}",
        minimum=SMALLEST_WORKSPACE,
        maximum=LARGEST_WORKSPACE,
        recipe=False,
    )

    def __post_init__(self) -> None:
        for flag in FLAGS:
            flag.check(getattr(self, flag.attribute))
        for axis in ("axis_key", "axis_value"):
            if getattr(self, axis) == PER_CHANNEL and self.group_size == -1:
                raise KVTunerConfigError(
                    f"--kvtuner-q-group-size is -1 with {flag_of(axis).name} 1; per-channel groups run along the tokens "
                    f"of a page, so give a group size that divides --page-size ({DEFAULT_PAGE_SIZE} by default)"
                )

    @classmethod
    def from_args(cls, args: Any, flags: Iterable[Flag] | None = None) -> KVTunerConfig:
        """Read the flags (all of them where None) from ServerArgs, a resolving view, the published ``kvtuner``
        namespace, or parsed arguments; the others have their defaults.

        Raises KVTunerConfigError for a value that cannot work.
        """
        return cls(**{flag.attribute: getattr(args, flag.field) for flag in (FLAGS if flags is None else flags)})


def _entries() -> tuple[Flag, ...]:
    hints = get_type_hints(KVTunerConfig)
    entries = []
    for field in dataclasses.fields(KVTunerConfig):
        optional = hints[field.name] == str | None
        of_field: dict[str, Any] = {
            "field": f"kvtuner_{field.name}",
            "attribute": field.name,
            "type": str if optional else hints[field.name],
            "default": field.default,
            "optional": optional,
        }
        entries.append(Flag(**{**of_field, **field.metadata}))
    return tuple(entries)


FLAGS = _entries()
SWITCH = Flag(
    field="enable_kvtuner_quant",
    attribute="",
    type=bool,
    default=False,
    help="Store the KV cache quantized and packed (KVTuner). The other --kvtuner-* flags say how.",
    valid="true, false",
    recipe=False,
)
RECIPE_FLAGS = tuple(flag for flag in FLAGS if flag.recipe)
FLAG_OF_FIELD = {flag.field: flag.name for flag in FLAGS}


def flag_of(attribute: str) -> Flag:
    """The flag of a field of KVTunerConfig."""
    return next(flag for flag in FLAGS if flag.attribute == attribute)


def add_recipe_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add RECIPE_FLAGS to a command line; ``defaults``, by attribute, stand in for the server's.

    Values are only parsed: KVTunerConfig refuses those that cannot work, as it does for the server.
    """
    for flag in RECIPE_FLAGS:
        default = defaults.get(flag.attribute, flag.default)
        argument = flag.argument()
        argument.pop("choices", None)
        argument["help"] += f" As the server's (default: {str(default).lower()})."
        parser.add_argument(flag.name, default=default, **argument)


def flags_table() -> str:
    """The table of flags in README.md."""
    rows = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for flag in (SWITCH, *FLAGS):
        if flag is SWITCH:
            values, default = "", "off"
        elif flag.type is bool:
            values, default = f"bare, {flag.valid}", str(flag.default).lower()
        else:
            values, default = flag.valid, "none" if flag.default is None else str(flag.default)
        rows.append(f"| `{flag.name}` | {values} | {default} | {flag.help} |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(flags_table(), end="")
