"""Check 4: pools whose offsets leave 31 bits, ids at the end of a pool, and what lies around the buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu_checks import construction
from gpu_checks.attending import TOLERANCE
from gpu_checks.cache import Cache, Shape, row_error
from gpu_checks.device import Device
from gpu_checks.recipes import layer_format, recipes
from gpu_checks.report import Findings
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat

GUARD_BYTES, GUARD = 1 << 16, 0xA5
# Elements of a buffer, so that offsets in bytes and in elements are above 2^31.
MANY = (1 << 31) + (1 << 26)


class Guarded:
    """Buffers with GUARD_BYTES before and behind each. ``fill`` makes them: torch.zeros, or torch.empty for huge ones."""

    def __init__(self, fill: Any = torch.zeros) -> None:
        self._fill, self._arenas = fill, []

    def __call__(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        # Room for the tensor ends where the tensor does: one byte further is a guard.
        arena = self._fill(GUARD_BYTES + size + GUARD_BYTES, dtype=torch.uint8, device=device)
        arena[:GUARD_BYTES] = GUARD
        arena[GUARD_BYTES + size :] = GUARD
        self._arenas.append((arena, size))
        return arena[GUARD_BYTES : GUARD_BYTES + size].view(dtype).view(shape)

    def damaged(self) -> int:
        """Guard bytes that were written."""
        guards = [part for a, size in self._arenas for part in (a[:GUARD_BYTES], a[GUARD_BYTES + size :])]
        return sum(int((guard != GUARD).sum()) for guard in guards)


@dataclass(frozen=True)
class Pool:
    """num_pages, num_slots: of the storage under test, of which the last ones are used."""

    name: str
    layer: LayerFormat
    kv_heads: int
    num_pages: int
    num_slots: int
    huge: bool


def check(device: Device, findings: Findings) -> str:
    """Requests at the end of each pool against the reference over a small twin. Parts whose buffers the device has no room for
    are left out."""
    found = list(pools(device))
    for pool in found:
        needed = _bytes_of(pool, device)
        if needed > device.free_bytes():
            findings.leave_out(
                f"{pool.name} needs {needed / 2**30:.1f} GiB, free are {device.free_bytes() / 2**30:.1f}"
            )
            continue
        findings.record("pools", {"pool": pool.name, "bytes": needed, "row_error": _check_pool(device, findings, pool)})
    return f"{len(findings.numbers.get('pools', []))} pools, their last pages and slots, guard bytes unchanged"


def pools(device: Device) -> Iterator[Pool]:
    small, wide = recipes(True)[0], TensorFormat.unquantized
    yield Pool("a small pool", layer_format(small), 1, 24, 6, huge=False)
    sinks = LayerFormat(small.key, small.value, 16)
    yield Pool("a small pool, sinks of a whole page", sinks, 1, 24, 6, huge=False)
    page, dim, kv_heads = (16, 64, 1) if device.small else (64, 128, 8)
    plain = LayerFormat(wide(page, dim, True), wide(page, dim, False))
    page_bytes = kv_heads * plain.key.block_bytes
    yield Pool("packed pages above 2^31 elements", plain, kv_heads, MANY // page_bytes, 6, huge=True)
    ring = 2 * page * kv_heads * dim  # of a slot, with a window of at most a page
    yield Pool("rings above 2^31 elements", plain, kv_heads, 24, MANY // ring, huge=True)
    with_sinks = LayerFormat(
        TensorFormat(4, True, 0, 64, page, dim, True), TensorFormat(4, True, 0, 64, page, dim, False), page
    )
    yield Pool("sinks above 2^31 elements", with_sinks, kv_heads, MANY // (page * kv_heads * dim), 6, huge=True)


def _bytes_of(pool: Pool, device: Device) -> int:
    layer, row = pool.layer, pool.kv_heads * pool.layer.key.head_dim * device.dtypes[0].itemsize
    page = layer.key.page_size
    return 2 * row * (pool.num_slots * 2 * page + pool.num_pages * layer.sink_length) + (
        pool.num_pages * pool.kv_heads * layer.page_bytes_per_head + (256 << 20)
    )


def _check_pool(device: Device, findings: Findings, pool: Pool) -> float:
    page, dtype = pool.layer.key.page_size, device.dtypes[0]
    # Zeroing gigabytes on a CPU would make them real; what is used of the buffer is copied from the twin.
    guarded = Guarded(torch.empty if pool.huge and not device.gpu else torch.zeros)
    shape = Shape(
        (pool.layer,), 2 * pool.kv_heads, pool.kv_heads, page - 1, dtype, num_slots=4, num_pages=20, max_pages=8
    )
    storage = construction.make_storage(
        shape.layers, num_pages=pool.num_pages, num_slots=pool.num_slots, residual=shape.residual,
        kv_heads=shape.kv_heads, dtype=dtype, device=device.device, allocate=guarded,
    )  # fmt: skip
    cache = Cache(
        device, shape, storage=storage, page_shift=pool.num_pages - shape.num_pages,
        slot_shift=pool.num_slots - shape.num_slots,
    )  # fmt: skip
    cache.copy_twin()
    cache.begin(1)
    cache.extend(1, 4 * page - 1)  # the step completes a page
    cache.begin(2, prefix_of=1, prefix_pages=2)
    cache.extend(2, 3, by_kernels=True)
    cache.begin(3)
    cache.extend(3, page + 2, by_kernels=True)
    last = shape.num_pages - 1  # pages are handed out from the end
    assert last in cache.requests[1].pages and max(cache.requests) == shape.num_slots - 1
    (ours,), (theirs,) = cache.decode([1, 2, 3])
    error = row_error(ours, theirs)
    findings.expect(error <= TOLERANCE[dtype], f"{pool.name}: a row is off by {error:.1e} of its norm")
    for difference in cache.differences():
        findings.expect(False, f"{pool.name}: {difference} differ")
    findings.expect(
        not guarded.damaged(), f"{pool.name}: {guarded.damaged()} guard bytes around the buffers were written"
    )
    return error
