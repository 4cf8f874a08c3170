"""Prefills by a library: which one is chosen, and what it is given. Stand-ins compute in torch what the libraries would on a GPU.
test_triton.py runs this file in Triton's interpreter, which gathers what they read."""

import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from harness.cache_model import CacheModel, naive_attention
from harness.formats import mixed_layers
from sglang.srt.kvtuner.attention import prefill_libraries
from sglang.srt.kvtuner.attention.base import Workload
from sglang.srt.kvtuner.attention.prefill_libraries import (
    LIBRARIES,
    VARIABLE,
    choose_library,
    requested_prefill,
    valid_prefills,
)
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.attention.triton import TritonKernels, interpreted
from sglang.srt.kvtuner.attention.triton_extend import Workspace
from sglang.srt.kvtuner.config.flags import KVTunerConfigError

WORKLOAD = Workload(32, 8, 128, page_size=64, dtype=torch.bfloat16, most_pages=100)


def varlen(q, k, v, q_start, k_start, scaling):
    """Attention request by request; queries are the last of a request's tokens."""
    assert q.dtype == k.dtype == v.dtype == torch.float16 and q.is_contiguous()
    assert k.shape == v.shape and k.stride(-1) == v.stride(-1) == 1
    parts = []
    for (first, last), (start, end) in zip(pairwise(q_start), pairwise(k_start), strict=True):
        parts.append(naive_attention(q[first:last], k[start:end], v[start:end], scaling))
    return torch.cat(parts).to(q.dtype)


class FakeWrapper:
    """Takes of FlashInfer's wrapper what the product uses of it, by position and name."""

    plans = 0

    def __init__(self, float_workspace_buffer, kv_layout, backend):
        assert float_workspace_buffer.dtype == torch.uint8 and float_workspace_buffer.numel() == 128 << 20
        assert (kv_layout, backend) == ("NHD", "fa2")

    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, causal, sm_scale, q_data_type, kv_data_type
    ):  # fmt: skip
        FakeWrapper.plans += 1
        for start in (qo_indptr, kv_indptr):
            assert start.device.type == "cpu" and start.dtype == torch.int32
        assert (num_qo_heads, num_kv_heads, head_dim_qk, causal) == (3, 1, 64, True)
        assert q_data_type == kv_data_type == torch.float16
        self.planned = qo_indptr.tolist(), kv_indptr.tolist(), sm_scale

    def run(self, q, k, v, *, out):
        q_start, k_start, scaling = self.planned
        assert (q.shape[0], k.shape[0]) == (q_start[-1], k_start[-1])
        out.copy_(varlen(q, k, v, q_start, k_start, scaling))


def fake_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, out
):  # fmt: skip
    """As upstream's wrapper around FlashAttention-3, of a build that does not take ``out``."""
    starts = []
    for start, most in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert start.dtype == torch.int32 and start.diff().max() == most
        starts.append(start.tolist())
    assert causal and out.shape == q.shape
    return varlen(q, k, v, *starts, softmax_scale)


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for both, and a GPU of a given capability."""
    from sglang.kernels.ops.attention import flash_attention_v3

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=FakeWrapper))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", SimpleNamespace())
    monkeypatch.setattr(flash_attention_v3, "flash_attn_varlen_func", fake_varlen_func)

    def on(name, capability):
        monkeypatch.setenv(VARIABLE, name)
        monkeypatch.setattr(prefill_libraries, "_capability", lambda: capability)

    return on


@pytest.mark.parametrize(
    "name, capability, chosen",
    [
        ("auto", (8, 9), None),
        ("auto", (9, 0), None),
        ("triton", None, None),
        ("flashinfer", (8, 0), "flashinfer"),
        ("flashinfer", (8, 9), "flashinfer"),
        ("fa3", (9, 0), "fa3"),
    ],
)
def test_libraries_are_chosen_by_name_alone(libraries, name, capability, chosen):
    """None of them was measured yet."""
    libraries(name, capability)
    assert choose_library(WORKLOAD) is LIBRARIES.get(chosen)


@pytest.mark.parametrize(
    "name, capability, workload, reason",
    [
        ("fa2", (9, 0), WORKLOAD, "is 'fa2'; valid are auto, triton, flashinfer, fa3"),
        ("fa3", (8, 9), WORKLOAD, "it is for GPUs of compute capability 9.0, and this one has 8.9; valid are auto, triton"),
        ("flashinfer", (9, 0), WORKLOAD, "compute capability 8.0, 8.6, 8.9, and this one has 9.0"),
        ("flashinfer", None, WORKLOAD, "and there is no GPU"),
        ("fa3", (9, 0), replace(WORKLOAD, dtype=torch.float32), "the model is in float32"),
        ("flashinfer", (8, 9), replace(WORKLOAD, head_dim=80), "heads of 64, 128, 256, and the model has 80"),
    ],
)  # fmt: skip
def test_what_a_library_does_not_serve_is_refused(libraries, name, capability, workload, reason):
    libraries(name, capability)
    with pytest.raises(KVTunerConfigError) as caught:
        choose_library(workload)
    assert str(caught.value).startswith(f"{VARIABLE} is {name!r}") and reason in str(caught.value)


def test_a_library_that_does_not_import_is_refused(libraries, monkeypatch):
    libraries("fa3", (9, 0))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", None)
    with pytest.raises(KVTunerConfigError, match=r"sgl_kernel\.flash_attn does not import"):
        choose_library(WORKLOAD)


def test_the_variable_is_checked_at_start(monkeypatch):
    assert valid_prefills("cuda") == ("auto", "triton", *LIBRARIES)
    monkeypatch.setenv(VARIABLE, "fa3")
    requested_prefill("cuda")
    with pytest.raises(KVTunerConfigError, match="SGLANG_KVTUNER_PREFILL is 'fa3'; valid are auto, triton"):
        requested_prefill("cpu")


def test_what_libraries_take_is_counted(libraries):
    plain = Workspace.memory(WORKLOAD, 2)
    rows = 3 * 8 * 16_384
    for name, capability, taken in (("flashinfer", (8, 9), 136 << 20), ("fa3", (9, 0), 4 * 16_384 * 32)):
        libraries(name, capability)
        assert sum(use.fixed for use in Workspace.memory(WORKLOAD, 2)) == sum(use.fixed for use in plain) + taken + rows


@pytest.mark.skipif(
    not interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported: test_triton.py runs these tests so"
)
@pytest.mark.parametrize("name, capability", [("flashinfer", (8, 9)), ("fa3", (9, 0))])
def test_attention_by_a_library(libraries, name, capability):
    """Without prefixes, with some, and with more than the workspace holds, which upstream's kernel takes in rounds."""
    libraries(name, capability)
    model = CacheModel(
        TritonKernels, mixed_layers(16, sinks=4), heads=3, kv_heads=1, residual=20, dtype=torch.float16, workspace_tokens=110
    )  # fmt: skip
    model.fill = ReferenceKernels(model.storage)
    for slot in (1, 2, 3):
        model.begin(slot)
    served = []
    attend = model.kernels._workspace._library.attend
    model.kernels._workspace._library.attend = lambda *args: (served.append(args[0]), attend(*args))
    FakeWrapper.plans = 0
    assert model.step((1, 40), (2, 3)) <= 2e-3
    assert model.step((1, 9), (3, 5), (2, 20)) <= 2e-3
    assert len(served) == 6 and len(set(map(id, served))) == 2, "two steps of three layers"
    assert FakeWrapper.plans == (2 if name == "flashinfer" else 0), "one for all layers"
    assert model.step((1, 30), (2, 30)) <= 2e-3
    assert len(served) == 6
    model.check()
