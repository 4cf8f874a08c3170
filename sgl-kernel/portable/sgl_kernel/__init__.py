"""Portable CPU build of ``sgl_kernel``: the functions that serving on a plain CPU needs, in torch.

Nothing is registered under ``torch.ops.sgl_kernel``; callers that probe it there find a CPU without the compiled
extension and take their generic paths.
"""

from sgl_kernel.accept import fill_accept_out_cache_loc_cpu, fill_bonus_tokens_cpu
from sgl_kernel.cache_copy import copy_all_layer_kv_cache_cpu
from sgl_kernel.cache_locs import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
)
from sgl_kernel.norm import rmsnorm
from sgl_kernel.tree_build import build_tree_kernel_efficient_cpu
from sgl_kernel.tree_verify import verify_tree_greedy_cpu

__version__ = "0.4.10+cpu"

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rmsnorm",
    "verify_tree_greedy_cpu",
]


def __getattr__(name):
    if name.startswith("__") and name.endswith("__"):
        # The import system and inspect probe dunders; theirs is the plain message.
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise AttributeError(
        f"sgl_kernel.{name} is not in the portable CPU build of sgl_kernel ({__version__}), which has only: "
        f"{', '.join(__all__)}. Install the published sglang-kernel on a machine with a GPU to have the rest."
    )
