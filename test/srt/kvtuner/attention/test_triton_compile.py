"""What the trial steps before serving launch is what serving launches, and it compiles; without a GPU: launches are written
down instead of made."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from harness.cache_model import CacheModel
from harness.formats import mixed_layers, tensor_format
from sglang.srt.kvtuner.attention import triton as triton_kernels
from sglang.srt.kvtuner.attention import triton_compile
from sglang.srt.kvtuner.attention.base import KernelsUnavailable
from sglang.srt.kvtuner.attention.triton import TritonKernels, interpreted
from sglang.srt.kvtuner.format.formats import LayerFormat

pytestmark = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 leaves nothing to compile")

TARGET = GPUTarget("cuda", 89, 32)
BACKEND = make_backend(TARGET)
PAGE = 16


class Launches:
    """Launches by what tells compiled kernels apart: name, types and specializations of arguments, constants, options."""

    def __init__(self):
        self.found = {}
        self._binders = {}

    def take(self):
        found, self.found = self.found, {}
        return found

    def note(self, kernel, *args, grid, warmup, **options):
        assert not warmup and all(isinstance(n, int) and n > 0 for n in grid), grid
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        bound, specialization, given = self._binders[kernel](*args, **options)
        key = (kernel.__name__, str(specialization), str(given))
        if key not in self.found:
            packed = kernel._pack_args(BACKEND, options, bound, specialization, given)
            self.found[key] = (kernel, *packed)


@pytest.fixture
def launches(monkeypatch):
    """Launches on a GPU with 132 multiprocessors."""
    launches = Launches()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: launches.note(kernel, *args, **options))
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: 132)
    return launches


def make_model(formats, heads, kv_heads, dtype, slots, max_pages=20):
    return CacheModel(
        TritonKernels, formats, heads=heads, kv_heads=kv_heads, residual=40, dtype=dtype, num_slots=slots, num_pages=8,
        max_pages=max_pages,
    )  # fmt: skip


def run(model, step):
    """A step as a model runs it: q, k and v are columns of one matrix."""
    tokens = int(step.query_start[-1])
    plan = model.kernels.plan(step)
    for layer in range(len(model.formats)):
        wide = torch.zeros(tokens, model.heads + 2 * model.kv_heads, model.head_dim, dtype=model.dtype)
        q, k, v = wide.split([model.heads, model.kv_heads, model.kv_heads], 1)
        model.kernels.attend(layer, plan, q, k, v, 0.125)
        model.kernels.store(layer, plan, k, v)


def serve(model):
    """Decode steps of all sizes; extends of one and several requests, tokens and rounds."""
    slots, columns = model.table.req_to_token.shape
    for rows in range(1, slots + 1):
        run(model, model.planner.plan_decode(torch.arange(rows), torch.arange(rows) % (columns - 1) + 1))
    whole = columns // PAGE - 1
    requests = 16_384 // (whole * PAGE) + 1  # their prefixes are more than the workspace holds
    assert requests < 64 < slots
    for prefix_pages, query_lens in (
        ([0], [1]), ([0], [2]), ([0], [7]), ([0], [PAGE]), ([0, 0], [PAGE + 3, 1]), ([1], [1]), ([1], [5]), ([whole], [1]),
        ([1, 0, 1], [1, 1, 1]), ([0, 1], [9, PAGE]), ([1] * 3, [2] * 3), ([0] * 32, [4] * 32), ([2] * 32, [3] * 32),
        *(([whole] * n, [count] * n) for n in (requests, requests + 1, 64) for count in (1, 3, PAGE)),
    ):  # fmt: skip
        model.table.req_generation += 1
        used = list(range(len(query_lens)))
        prefix_lens = [pages * PAGE for pages in prefix_pages]
        run(model, model.planner.plan(used, prefix_lens, query_lens))
        prefix_lens = [length + 1 for length in prefix_lens]  # the next chunk
        run(model, model.planner.plan(used, prefix_lens, [min(query_lens[0], 5)] * len(used)))


LAYER = LayerFormat(tensor_format(4, False, 0, 64, PAGE, 64, True), tensor_format(4, False, 0, 64, PAGE, 64, False))


@pytest.mark.parametrize(
    "formats, heads, kv_heads, dtype, slots, max_pages",
    [
        ((LAYER,) * 3, 4, 2, torch.float16, 160, 20),
        ((LAYER,), 1, 1, torch.float32, 70, 1100),
        (mixed_layers(PAGE, sinks=4), 24, 1, torch.bfloat16, 70, 20),
    ],
    ids=["uniform", "long-context", "mixed"],
)
def test_trials_launch_what_serving_launches(launches, formats, heads, kv_heads, dtype, slots, max_pages):
    model = make_model(formats, heads, kv_heads, dtype, slots, max_pages)
    triton_compile.try_kernels(model.kernels, model.planner, heads, 16_384)
    tried = launches.take()
    serve(model)
    served = launches.take()
    assert {name for name, *_ in served} == {
        *("plan_decode_kernel", "store_pages_kernel", "attend_decode_kernel", "merge_splits_kernel"),
        *("store_rows_kernel", "gather_kernel", "_fwd_kernel", "merge_into_kernel"),
    }
    assert set(served) - set(tried) == set(), "a request would wait for the compiler"
    assert set(tried) - set(served) == set(), "compiled in vain"


def test_what_the_trials_launch_compiles(launches):
    """For sm_89, without the many numbers of splits and of requests."""
    model = make_model((LAYER,), 2, 1, torch.bfloat16, slots=2)
    triton_compile.try_kernels(model.kernels, model.planner, 2, 16_384)
    compiled = {}
    for kernel, options, signature, constants, attributes in launches.take().values():
        if kernel.__name__ not in compiled:
            source = ASTSource(kernel, signature, constants, attributes)
            compiled[kernel.__name__] = triton.compile(source, target=TARGET, options=options.__dict__)
    assert len(compiled) == 7 and all(kernel.asm["cubin"] for kernel in compiled.values())


def test_a_kernel_that_does_not_compile_is_told_with_its_step(monkeypatch):
    def run(kernel, *args, grid, **options):
        if kernel.__name__ == "gather_kernel":
            raise RuntimeError("ptxas: out of registers")

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: 132)
    model = make_model((LAYER, LAYER), 2, 1, torch.bfloat16, slots=8)
    with pytest.raises(KernelsUnavailable) as caught:
        model.kernels.compile(model.planner, model.workload)
    assert str(caught.value) == (
        "the Triton kernels for an extend with a prefix (requests: 1) in layer 0 cannot be compiled or launched: ptxas: out "
        "of registers"
    )


def test_the_log_says_how_far_it_is(launches, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(triton_compile, "PROGRESS_SECONDS", 0.0)
    model = make_model(mixed_layers(PAGE), 2, 1, torch.bfloat16, slots=2)
    model.kernels.compile(model.planner, model.workload)
    first, *progress, last = caplog.messages
    steps = len(progress)
    assert first.startswith(f"Compiling the Triton kernels of the quantized KV cache: {steps} trial steps in 3 layers ")
    assert progress[0].startswith(f"Compiling the Triton kernels of the quantized KV cache: 1 of {steps} trial steps, ")
    assert last.startswith("Triton kernels of the quantized KV cache are ready (")


def test_nobodys_request_is_touched(launches):
    """What the trials' plans say of slots; test_triton_steps.py looks at what kernels write."""
    model = make_model((LAYER,), 2, 1, torch.bfloat16, slots=4)
    model.planner.rings.start[:] = torch.tensor([0, 16, 32, 48])
    plans = []
    monkey_plan = model.kernels.plan
    model.kernels.plan = lambda step: plans.append(step) or monkey_plan(step)
    triton_compile.try_kernels(model.kernels, model.planner, 2, 16_384)
    assert len(plans) == 7
    for step in plans:
        assert not step.slots.any() and not step.pages.any()
    assert model.planner.rings.start.tolist() == [0, 16, 32, 48]
