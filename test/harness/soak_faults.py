"""Faults to plant in the product, for tests of the soak: each is called in the process of a soak, before the cache is made.

Most show in one call of EVERY, as real ones do: not at once, and not in all layers.
"""

import itertools
from dataclasses import replace

from harness.soak import PAGE
from sglang.srt.kvtuner.attention import steps
from sglang.srt.kvtuner.attention.cpu import CpuKernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels

EVERY = 7


def page_id_off_by_one():
    """The plan names a neighbour of the newest packed page of the request that has most."""

    def plan(original, **fields):
        found = original(**fields)
        request = max(found.requests, key=lambda request: request.packed_end, default=None)
        if request is None or request.packed_end == 0:
            return found
        pages = found.pages.clone()
        newest = pages[request.row, request.packed_end // PAGE - 1]
        newest += 1 if newest == 1 else -1
        return replace(found, pages=pages)

    _now_and_then(steps, "StepPlan", plan)


def stale_ring_start():
    """The planner does not see that a slot goes to another request, and leaves its ring's start where it was."""
    original = steps.StepPlanner.__init__

    def init(self, *, req_generation, **others):
        original(self, req_generation=req_generation.clone(), **others)

    steps.StepPlanner.__init__ = init


def written_off_by_one(buffer):
    """``store`` writes pages, sinks or ring rows (``buffer``: "pages", "sinks", "ring") one further than it should."""

    def store(original, self, layer, *args):
        tensors = _tensors(self, layer, buffer)
        before = [t.clone() for t in tensors]
        original(self, layer, *args)
        dims = 2 if buffer == "ring" else 1
        for now, old in zip(tensors, before, strict=True):
            changed = (now != old).flatten(dims).any(-1)
            rows = now[changed].clone()
            now.copy_(old)
            # Where the last row's neighbour is the first, rows end up in another order, which is as wrong.
            now[changed.roll(1, dims - 1)] = rows

    _now_and_then_in_kernels("store", store)


def read_off_by_one(buffer):
    """``attend`` reads pages, sinks or ring rows one before those that it should."""

    def attend(original, self, layer, *args):
        tensors = _tensors(self, layer, buffer)
        before = [t.clone() for t in tensors]
        for t in tensors:
            t.copy_(t.roll(1, 1 if buffer == "ring" else 0))
        try:
            return original(self, layer, *args)
        finally:
            for t, old in zip(tensors, before, strict=True):
                t.copy_(old)

    _now_and_then_in_kernels("attend", attend)


def _tensors(kernels, layer, buffer):
    halves = kernels.storage.layers[layer]
    return [getattr(half, buffer) for half in (halves.key, halves.value)]


def _now_and_then_in_kernels(name, faulty):
    for kernels in (CpuKernels, ReferenceKernels):
        _now_and_then(kernels, name, faulty)


def _now_and_then(owner, name, faulty):
    """Have one call of EVERY of a function go to ``faulty``, which gets the function first."""
    original, calls = getattr(owner, name), itertools.count(1)

    def function(*args, **kwargs):
        if next(calls) % EVERY:
            return original(*args, **kwargs)
        return faulty(original, *args, **kwargs)

    setattr(owner, name, function)
