"""What a piece of code asks of a GPU, recorded without one: launches and allocations; reading from the device is refused.

Triton's kernels do not run. Operations of torch do, on the CPU; on a GPU each that is no view and no bare allocation would be a
launch of its own.
"""

import contextlib
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang.kernels.ops.attention.kvtuner.triton_plan import plan_decode_kernel

# Methods that hand values to Python without an operation that a dispatch mode would see, or copy between host and device.
READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "cuda",
    "__array__",
    "__dlpack__",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
}
# Operations that wait for the device: the host needs a value, or the size of the result. lift_fresh: a tensor of host values.
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "bincount", "lift_fresh",
}  # fmt: skip
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class HostRead(AssertionError):
    """The host waits for the device."""


class Recording:
    """launches: names of Triton kernels and of torch's operations that are kernels; allocations: the same of bare allocations."""

    def __init__(self):
        self.launches, self.allocations = [], []


class _Reads(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            raise HostRead(f"Tensor.{name}")
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in WAITS or by_mask or str(function) == "aten.repeat_interleave.Tensor":
            raise HostRead(f"torch's {name}")
        result = function(*args, **(kwargs or {}))
        if name in ALLOCATES:
            self.recording.allocations.append(name)
        elif function._schema.is_mutable or not _storages(result) <= _storages((args, kwargs)):
            # Not by the schema alone: reshape, contiguous and to are views of what needs no copy.
            self.recording.launches.append(name)
        return result


def _storages(values):
    """Addresses of all tensors' storages."""
    return {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


@contextlib.contextmanager
def recorded():
    """Record what the block launches and allocates; raises :class:`HostRead` where the host would wait for a GPU."""
    recording = Recording()

    def launch(kernel, grid):
        return lambda *arguments, **options: recording.launches.append(kernel.fn.__name__)

    with patch.object(type(plan_decode_kernel), "__getitem__", launch), _Reads(), _Operations(recording):
        yield recording
