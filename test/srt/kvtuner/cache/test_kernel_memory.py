"""What attention takes beside the cache: left out of the budget for pages, told in the log, and counted for what is then made."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.sizing import MB, FakeKernels, allocated
from sglang.srt.kvtuner.attention import dispatch
from sglang.srt.kvtuner.attention.backend import KVTunerAttnBackend
from sglang.srt.kvtuner.attention.base import Workload
from sglang.srt.kvtuner.attention.triton import TritonKernels
from sglang.srt.kvtuner.cache import sizing
from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory
from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool


def test_what_kernels_take_is_not_for_pages(serve, monkeypatch, caplog):
    caplog.set_level("INFO")
    plain, _ = serve(16 * MB, max_running_requests=4).settle()
    assert "beside the cache" not in caplog.text
    monkeypatch.setattr(FakeKernels, "needed", (KernelMemory("a workspace", 5 * MB), KernelMemory("plans", MB, 2 * MB)))
    budget = (16 + 5 + 1 + 5 * 2) * MB  # four requests and the padding slot
    config, pool = serve(budget, max_running_requests=4).settle()
    assert config.max_total_num_tokens == plain.max_total_num_tokens == pool.size
    assert "16.0 MB beside the cache (a workspace 5.0 MB, plans 11.0 MB)" in caplog.text


@pytest.mark.parametrize("per_slot", [1000, 300_000])
def test_requests_share_a_fifth_with_what_kernels_take_for_them(serve, monkeypatch, per_slot):
    monkeypatch.setattr(FakeKernels, "needed", (KernelMemory("workspace", 3 * MB), KernelMemory("plans", 0, per_slot)))
    runner = serve(23 * MB)
    config, pool = runner.settle()
    ring = pool.storage.ring_bytes() // pool.storage.num_slots
    assert pool.storage.num_slots == int(0.2 * 20 * MB) // (ring + per_slot) == config.max_running_requests + 1
    taken = allocated(pool) + 3 * MB + pool.storage.num_slots * per_slot
    assert taken <= runner.budget < taken + allocated(pool) // pool.storage.num_pages


def test_kernels_that_leave_no_room_are_named(serve, monkeypatch):
    monkeypatch.setattr(FakeKernels, "needed", (KernelMemory("prefill workspace of 7 tokens", 15 * MB),))
    message = r"attention \(prefill workspace of 7 tokens 15.0 MB\); the KV budget is"
    with pytest.raises(KVTunerConfigError, match=message):
        serve(16 * MB, max_running_requests=4).settle()


def test_what_is_counted_is_what_the_backend_makes_kernels_for(serve, monkeypatch):
    """What they allocate for it, and count: test_triton_steps.py."""
    monkeypatch.setattr(FakeKernels, "workloads", [])
    monkeypatch.setattr(FakeKernels, "needed", (KernelMemory("plans", MB, 1000),))
    runner = serve(16 * MB, max_running_requests=4, kvtuner_workspace_tokens=2048)
    config, pool = runner.settle()
    table = ReqToTokenPool(config.max_running_requests, sizing.longest_request(runner), "cpu", False)
    layers = nn.ModuleList([RadixAttention(4, 64, 0.1, 2, layer_id=i) for i in range(2)])
    KVTunerAttnBackend(SimpleNamespace(token_to_kv_pool=pool, model=layers, req_to_token_pool=table))
    assert pool.kernel_bytes == {"plans": MB + 5 * 1000}
    assert len(FakeKernels.workloads) > 2 and set(FakeKernels.workloads) == {
        Workload(4, 2, 64, page_size=64, dtype=torch.bfloat16, most_pages=64, workspace_tokens=2048)
    }


def test_the_workspace_of_the_triton_kernels(serve, monkeypatch, caplog):
    """The flag's tokens in the model's dtype, which two ranks halve with their heads."""
    caplog.set_level("INFO")
    monkeypatch.setattr(dispatch, "choose_kernels", lambda device, formats: (TritonKernels, []))
    for ranks, size in ((1, "64.0"), (2, "32.0")):
        caplog.clear()
        serve(256 * MB, max_running_requests=4, tp_size=ranks, kvtuner_workspace_tokens=131072).settle()
        assert f"prefill workspace of 131072 tokens {size} MB, prefill partial results " in caplog.text
