"""Check 7: a slot changes hands while the step that its earlier request did not need is still on its way."""

from __future__ import annotations

import torch

from gpu_checks.attending import TOLERANCE
from gpu_checks.cache import Cache, Shape, row_error
from gpu_checks.device import Device
from gpu_checks.recipes import mixed_layers
from gpu_checks.report import Findings

SLOT, OTHER = 1, 2
STEPS = 3


def check(device: Device, findings: Findings) -> str:
    """The next owner's outputs, pages and ring are what they are in a cache of its own, and what the reference makes of them."""
    layers = mixed_layers(device.small)
    page, heads = layers[0].key.page_size, (2, 1) if device.small else (32, 8)
    shape = Shape(layers, *heads, residual=page + 3, dtype=device.dtypes[0])
    shared, alone = Cache(device, shape, seed=4), Cache(device, shape, seed=5)
    donor, own = shared.rows(3 * page), shared.rows(page - 2)
    steps = [shared.padded_rows([SLOT]) for _ in range(STEPS)]
    for cache in (shared, alone):  # the request whose pages the next owner finds in the prefix cache
        cache.begin(OTHER)
        cache.extend(OTHER, 3 * page, rows=donor)
    shared.begin(SLOT)
    shared.extend(SLOT, 4 * page - 2, by_kernels=True)
    for _ in range(3):  # the last one is the overshoot: its request ended with the one before
        shared.decode([SLOT])
    outputs = []
    for cache in (shared, alone):
        cache.begin(SLOT, prefix_of=OTHER, prefix_pages=2)
        cache.extend(SLOT, page - 2, by_kernels=True, rows=own)
        outputs.append([cache.decode([SLOT], rows=rows) for rows in steps])
    worst = 0.0
    for number, ((ours, theirs), (solo, _)) in enumerate(zip(*outputs, strict=True)):
        for layer, (a, expected, b) in enumerate(zip(ours, theirs, solo, strict=True)):
            where = f"step {number} of the next owner, layer {layer}"
            findings.expect(torch.equal(a, b), f"{where}: another output than in a cache of its own")
            error = row_error(a, expected)
            worst = max(worst, error)
            findings.expect(error <= TOLERANCE[shape.dtype], f"{where}: a row is off by {error:.1e} of its norm")
    for name, a, b in zip(_names(shared), _owned(shared), _owned(alone), strict=True):
        findings.expect(torch.equal(a, b), f"the next owner's {name} differ from those in a cache of its own")
    for difference in shared.differences():
        findings.expect(False, f"{difference} differ from what the reference stores")
    findings.numbers.update(row_error=worst, steps=STEPS)
    return "the next owner of a slot reads and leaves what it does alone, behind an overshoot and a found prefix"


def _owned(cache: Cache) -> list[torch.Tensor]:
    """Pages of the slot's request in their order, and the rows of its ring that it wrote."""
    request, found = cache.requests[SLOT], []
    ids = torch.tensor(request.pages[: request.length // cache.page], device=cache.device.device)
    length = cache.storage.ring_length
    kept = [p % length for p in range(max(request.found, request.length - length), request.length)]
    for layer in cache.storage.layers:
        for half in (layer.key, layer.value):
            found += [half.pages[ids], half.ring[SLOT][kept]]
    return found


def _names(cache: Cache) -> list[str]:
    halves = [f"{half} in layer {layer}" for layer in range(len(cache.shape.layers)) for half in ("keys", "values")]
    return [f"{part} of {half}" for half in halves for part in ("pages", "ring rows")]
