"""A decode step on a GPU is launches alone, few of them: counted, through the backend, with a recorder in the kernels' place."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.formats import mixed_layers
from harness.launches import HostRead, recorded
from sglang.kernels.ops.attention.kvtuner.triton_attend import attend_decode_kernel
from sglang.kernels.ops.attention.kvtuner.triton_merge import merge_splits_kernel
from sglang.kernels.ops.attention.kvtuner.triton_plan import plan_decode_kernel
from sglang.kernels.ops.attention.kvtuner.triton_store import store_pages_kernel
from sglang.srt.kvtuner.attention import dispatch
from sglang.srt.kvtuner.attention import triton as implementation
from sglang.srt.kvtuner.attention.backend import KVTunerAttnBackend
from sglang.srt.kvtuner.attention.steps import StepPlanner
from sglang.srt.kvtuner.attention.triton import TritonKernels
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

PAGE, CONTEXT = 16, 128
LAUNCHES_OF_A_STEP, LAUNCHES_OF_A_LAYER = 1, 3
# The result.
ALLOCATIONS_OF_A_LAYER = 1


class Decoder:
    """A backend over layers of several formats, and a batch that decodes; the last row is padding."""

    def __init__(self, rows=3, heads=4, kv_heads=1, dtype=torch.bfloat16):
        formats = mixed_layers(PAGE, sinks=4)
        head_dim = formats[0].key.head_dim
        self.layers = nn.ModuleList(
            RadixAttention(heads, head_dim, head_dim**-0.5, kv_heads, layer_id=i) for i in range(len(formats))
        )
        pool = KVTunerTokenToKVPool(
            CacheFormat(tuple(formats), PAGE, residual_length=20), size=4 * PAGE, num_slots=rows + 1, kv_heads=kv_heads,
            full_precision_dtype=dtype, device="cpu", start_layer=0, end_layer=len(formats),
        )  # fmt: skip
        requests = ReqToTokenPool(rows, CONTEXT, "cpu", False)
        runner = SimpleNamespace(token_to_kv_pool=pool, model=self.layers, req_to_token_pool=requests)
        self.backend = KVTunerAttnBackend(runner)
        self.backend.init_cuda_graph_state(rows, rows)
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            req_pool_indices=torch.arange(rows - 1, -1, -1),
            seq_lens=torch.tensor([*range(CONTEXT - rows + 2, CONTEXT + 1), 1]),
            seq_lens_cpu=None,
        )
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        q, k, v = torch.zeros(rows, sum(widths), dtype=dtype).split(widths, dim=-1)
        self.qkv = q, k.view(rows, kv_heads, head_dim), v.view(rows, kv_heads, head_dim)

    def check(self, prepare="init_forward_metadata"):
        """What a step asks of the GPU, its plan made by a method of the backend, is within the bounds."""
        with torch.inference_mode():
            with recorded() as step:
                getattr(self.backend, prepare)(self.batch)
            assert len(step.launches) <= LAUNCHES_OF_A_STEP, f"the step launches {step.launches}"
            assert not step.allocations, f"the step allocates: {step.allocations}"
            for layer in self.layers:
                with recorded() as done:
                    self.backend.forward_decode(*self.qkv, layer, self.batch)
                assert len(done.launches) <= LAUNCHES_OF_A_LAYER, f"layer {layer.layer_id} launches {done.launches}"
                assert len(done.allocations) <= ALLOCATIONS_OF_A_LAYER, f"it allocates: {done.allocations}"


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """The choice of a GPU, on tensors of the CPU."""
    monkeypatch.setattr(dispatch, "choose_kernels", lambda *_: (TritonKernels, []))
    monkeypatch.setattr(TritonKernels, "compile", lambda *_: None)  # trial steps, which launch
    monkeypatch.setattr(implementation, "interpreted", lambda: False)
    monkeypatch.setattr(implementation, "_multiprocessors", lambda _: 132)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, heads, kv_heads", [(1, 4, 4), (3, 6, 2), (64, 20, 1)])
def test_a_step_is_launches_alone(rows, heads, kv_heads, dtype):
    Decoder(rows, heads, kv_heads, dtype).check()


def test_a_captured_step_plans_within_the_graph():
    decoder = Decoder()
    with recorded() as before:
        decoder.backend.init_forward_metadata_out_graph(decoder.batch)
    assert before.launches == before.allocations == [], "work of the host before every replay"
    decoder.check("init_forward_metadata_in_graph")


def test_the_recorder_sees_what_runs():
    decoder = Decoder()
    with recorded() as step:
        decoder.backend.init_forward_metadata(decoder.batch)
        decoder.backend.forward_decode(*decoder.qkv, decoder.layers[0], decoder.batch)
    assert step.launches == ["plan_decode_kernel", "attend_decode_kernel", "merge_splits_kernel", "store_pages_kernel"]


@pytest.mark.skipif(
    implementation.interpreted(),
    reason="TRITON_INTERPRET=1 makes kernels that are not compiled, which is what counts here",
)
def test_launches_compare_no_globals():
    """Triton compares the globals that a kernel reads with what they were, in every launch; constants take a microsecond each."""
    for kernel in (plan_decode_kernel, attend_decode_kernel, merge_splits_kernel, store_pages_kernel):
        assert kernel.cache_key and not kernel.used_global_vals, kernel.__name__


def store_twice(kernels, layer, plan, k, v):
    TritonKernels.store(kernels, layer, plan, k, v)
    TritonKernels.store(kernels, layer, plan, k, v)


def before_attending(work):
    """Kernels whose attention of every layer does some more work first."""

    def attend(kernels, layer, plan, q, *rest):
        work(plan, q)
        return TritonKernels.attend(kernels, layer, plan, q, *rest)

    return "attend", attend


def plan_by_torch(planner, *arguments):
    return StepPlanner.plan_decode(planner, *arguments)


MUTANTS = {
    "a launch more": ("store", store_twice, "layer 0 launches .*store_pages_kernel.*store_pages_kernel"),
    "an operation of torch": (*before_attending(lambda plan, q: q * 2), "layer 0 launches .*mul"),
    "a copy": (*before_attending(lambda plan, q: q.contiguous()), "layer 0 launches .*contiguous"),
    "a conversion": (*before_attending(lambda plan, q: q.to(torch.float64)), "layer 0 launches .*to"),
    "writing in place": (*before_attending(lambda plan, q: q.zero_()), "layer 0 launches .*zero_"),
    "buffers made anew": (*before_attending(lambda plan, q: torch.empty_like(q)), "it allocates"),
    "item": (*before_attending(lambda plan, q: plan.prefix_lens[0].item()), "item"),
    "int": (*before_attending(lambda plan, q: int(plan.prefix_lens[0])), "int|item|scalar"),
    "a condition": (*before_attending(lambda plan, q: bool(plan.prefix_lens[0] > 3)), "bool|nonzero|scalar"),
    "tolist": (*before_attending(lambda plan, q: plan.slots.tolist()), "tolist"),
    "a copy to the host": (*before_attending(lambda plan, q: plan.slots.cpu()), "cpu"),
    "a mask": (*before_attending(lambda plan, q: plan.pages[plan.prefix_lens > 0]), "index"),
    "nonzero": (*before_attending(lambda plan, q: plan.prefix_lens.nonzero()), "nonzero"),
    "values of the host": (*before_attending(lambda plan, q: torch.tensor([1, 2])), "lift_fresh"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_kernels_that_ask_more_are_found(name, monkeypatch):
    method, replacement, message = MUTANTS[name]
    worse = type("Worse", (TritonKernels,), {method: replacement})
    monkeypatch.setattr(dispatch, "choose_kernels", lambda *_: (worse, []))
    decoder = Decoder()
    with pytest.raises(AssertionError, match=message):
        decoder.check()


def test_a_plan_of_many_operations_is_found(monkeypatch):
    monkeypatch.setattr(TritonKernels.planner_class, "plan_decode", plan_by_torch)
    decoder = Decoder()
    with pytest.raises(AssertionError, match="the step launches"):
        decoder.check()


def test_waiting_for_the_device_is_what_a_host_read_is():
    with recorded(), pytest.raises(HostRead):
        torch.ones(1).item()
