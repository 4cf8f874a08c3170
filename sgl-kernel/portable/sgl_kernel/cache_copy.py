"""Copying tokens between slots of the KV cache, in all layers."""

import ctypes

import torch

from sgl_kernel._checks import check_cpu, check_index


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Copy slots ``src_loc`` to slots ``tgt_loc`` in every buffer.

    A buffer is given by its address and its bytes per slot, as a layer's keys and values are. All sources are read
    before anything is written, so the two lists may overlap.

    Args:
        data_ptrs: [buffers] 64-bit integers, addresses in host memory; the caller keeps the memory alive, and it must
            hold every slot named.
        strides: [buffers] int, bytes per slot of each buffer.
        tgt_loc, src_loc: [tokens] int, slots; a slot may stand only once in ``tgt_loc``.

    Raises:
        ValueError: the lists differ in length, a slot is negative, or an address is null.
    """
    check_cpu("data_ptrs", data_ptrs)
    check_cpu("strides", strides)
    source = check_index("src_loc", src_loc)
    target = check_index("tgt_loc", tgt_loc, source.numel())
    if data_ptrs.numel() != strides.numel():
        raise ValueError(f"{data_ptrs.numel()} addresses, but {strides.numel()} strides")
    if source.numel() == 0:
        return
    if min(int(source.min()), int(target.min())) < 0:
        raise ValueError("slots must not be negative")
    slots = max(int(source.max()), int(target.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist()):
        if not address:
            raise ValueError("a buffer's address is null")
        memory = (ctypes.c_uint8 * (slots * stride)).from_address(address)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(slots, stride)
        rows.index_copy_(0, target, rows.index_select(0, source))
