"""Argument checks that the functions of this package share."""

import torch

_INTEGER = (torch.int32, torch.int64)


def check_index(name, tensor, length=None):
    """Require a 1-D int32/int64 CPU tensor, of ``length`` elements where given, and return it as int64."""
    check_cpu(name, tensor)
    if tensor.dim() != 1 or tensor.dtype not in _INTEGER:
        raise ValueError(f"{name} must be a 1-D int32 or int64 tensor, not {describe(tensor)}")
    if length is not None and tensor.numel() != length:
        raise ValueError(f"{name} must have {length} elements, not {tensor.numel()}")
    return tensor.to(torch.int64)


def check_matrix(name, tensor, rows=None, columns=None):
    """Require a 2-D CPU tensor with ``rows`` rows and ``columns`` columns, where given, and return it."""
    check_cpu(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be a 2-D tensor, not {describe(tensor)}")
    for what, want, have in (("rows", rows, tensor.shape[0]), ("columns", columns, tensor.shape[1])):
        if want is not None and want != have:
            raise ValueError(f"{name} must have {want} {what}, not {have}")
    return tensor


def check_cpu(name, tensor):
    """Require a tensor in host memory."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be a tensor on the CPU, not {describe(tensor)}")


def check_room(name, tensor, needed):
    """Require an output of at least ``needed`` elements that can be written through a flat view; return that view."""
    check_cpu(name, tensor)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: it is written in place")
    if tensor.numel() < needed:
        raise ValueError(f"{name} has room for {tensor.numel()} elements, but {needed} are to be written")
    return tensor.view(-1)


def describe(value):
    """What an argument is, for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"
