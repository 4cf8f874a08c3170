"""Config fields of the ``kvtuner`` namespace, made from the flag table of the quantized KV cache."""

from __future__ import annotations

import msgspec

from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.arg_groups.choices import add_attention_backend_choices
from sglang.srt.kvtuner.config.flags import ATTENTION_BACKEND, FLAGS, SWITCH, Flag


def _metadata(flag: Flag) -> Arg:
    if flag.type is bool and flag is not SWITCH:
        # Upstream's bool is a bare switch; this one also takes its value as a word.
        return Arg(action="store", action_kwargs=flag.argument())
    return Arg(help=flag.help, choices=list(flag.choices) or None)


add_attention_backend_choices([ATTENTION_BACKEND])

KVTuner = msgspec.defstruct(
    "KVTuner",
    [
        (flag.field, A[flag.type | None if flag.optional else flag.type, _metadata(flag)], flag.default)
        for flag in (SWITCH, *FLAGS)
    ],
    namespace={"__doc__": "Namespace ``kvtuner``.", "_NS_PATH": "kvtuner"},
    module=__name__,
)
