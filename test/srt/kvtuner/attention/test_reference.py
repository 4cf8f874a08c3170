"""What the reference promises beside right results: bounded memory, and no question to the device."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.cache_model import CacheModel
from harness.formats import mixed_layers
from harness.peak import peak_memory
from sglang.srt.kvtuner.attention import reference
from sglang.srt.kvtuner.attention.reference import ReferenceKernels

# Operators whose results depend on values: on a GPU each waits for the device.
_ASK = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "repeat_interleave")


class NoQuestions(TorchDispatchMode):
    """Refuses operators that bring a value to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in _ASK), f"{func} asks the device"
        indices = args[1] if str(func).startswith("aten.index.Tensor") else ()
        assert all(i is None or i.dtype != torch.bool for i in indices), f"{func} with a mask asks the device"
        return func(*args, **(kwargs or {}))


def small_parts(monkeypatch, tokens=32, weights=1 << 12):
    monkeypatch.setattr(reference, "PART_TOKENS", tokens)
    monkeypatch.setattr(reference, "MAX_WEIGHTS", weights)


def make_model(page=16, residual=20, heads=6, kv_heads=2, **options):
    model = CacheModel(
        ReferenceKernels, mixed_layers(page, sinks=3), heads=heads, kv_heads=kv_heads, residual=residual, **options
    )
    for slot in (1, 2):
        model.begin(slot)
    return model


@pytest.mark.parametrize("tokens, weights", [(1, 1), (32, 1 << 12), (48, 1 << 20)])
def test_parts_change_nothing(monkeypatch, tokens, weights):
    """Prefixes, chunks and rings longer than a part, queries in blocks."""
    small_parts(monkeypatch, tokens, weights)
    model = make_model(residual=100)
    for counts in ((150, 7), (70, 131), (1, 1), (1, 40)):
        assert model.step(*enumerate(counts, start=1)) <= 1e-5
    model.check()


def test_a_step_asks_the_device_for_nothing():
    model = make_model()
    model.step((1, 150), (2, 7))
    for counts in ((1, 1), (40, 1)):
        for slot, count in enumerate(counts, start=1):
            model.table.extend(slot, len(model.requests[slot]) + count)
        lengths = [len(model.requests[slot]) for slot in (1, 2)]
        plan = model.kernels.plan(model.planner.plan((1, 2), lengths, counts))
        assert plan.requests  # made once for all layers, from numbers that the host has
        new, q = model.rows(sum(counts)), torch.randn(sum(counts), 6, 64)
        with NoQuestions():
            for layer in range(3):
                model.kernels.attend(layer, plan, q, *new[:, layer].unbind(1), 0.1)
                model.kernels.store(layer, plan, *new[:, layer].unbind(1))


def test_the_test_sees_questions():
    with NoQuestions(), pytest.raises(AssertionError, match="asks the device"):
        torch.ones(2)[torch.tensor([True, False])]
    with NoQuestions(), pytest.raises(AssertionError, match="asks the device"):
        torch.ones(2).sum().item()


def peaks_of_attention(length, heads, kv_heads, queries=300):
    """Peak memory of attention in every layer, without the result, after a prefix of ``length``."""
    model = make_model(64, 64, heads, kv_heads, num_pages=200, max_pages=140)
    model.step((1, length), attend=False)
    model.table.extend(1, length + queries)
    plan = model.kernels.plan(model.planner.plan([1], [length], [queries]))
    new, q = model.rows(queries), torch.randn(queries, heads, 64)
    for layer in range(3):
        keys, values = new[:, layer].unbind(1)
        yield peak_memory(functools.partial(model.kernels.attend, layer, plan, q, keys, values, 0.1)) - q.nbytes


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (16, 4)])
def test_memory_is_what_sizing_counts_whatever_the_prefix(monkeypatch, heads, kv_heads):
    small_parts(monkeypatch, tokens=256, weights=1 << 16)
    workload = make_model(heads=heads, kv_heads=kv_heads).workload
    (counted,) = (use.bytes(0) for use in ReferenceKernels.memory(workload))
    short, long = (max(peaks_of_attention(length, heads, kv_heads)) for length in (1024, 8192))
    assert counted / 3 <= long <= counted
    assert long <= 1.01 * short
