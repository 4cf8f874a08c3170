"""The CUDA kernels' own source on the host machine: decode steps against float64, packed bytes against the codec, and no
access that a GPU would not forgive."""

import pytest
import torch

from harness.cache_model import naive_attention
from harness.chosen import chosen_values
from harness.device import build
from harness.device.cases import BITS, GROUPS, HEAD_DIMS, Case, all_widths, layer_of, random_layers, supported
from harness.device.steps import TOLERANCE, cache_of, decode
from sglang.srt.kvtuner.format.formats import LayerFormat

CASES = all_widths(2)


@pytest.fixture(scope="module", autouse=True)
def libraries(request):
    """The compiler takes most of the time, on one core: all chosen cases' libraries are built at once."""
    cases = chosen_values(request, "case")
    build.load_all((LayerFormat(case.layer.key, case.layer.value), case.dtype == torch.bfloat16) for case in cases)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_step(case):
    assert decode(cache_of(case)) <= TOLERANCE


def test_cases_have_everything():
    def seen(get):
        return {get(case) for case in CASES}

    assert seen(lambda c: (c.layer.key.nbits, c.layer.value.nbits)) == {(k, v) for k in BITS for v in BITS}
    assert seen(lambda c: c.group) == set(GROUPS)
    assert seen(lambda c: c.layer.key.head_dim) == set(HEAD_DIMS)
    assert seen(lambda c: c.dtype) == {torch.float16, torch.bfloat16}
    for half in ("key", "value"):
        kinds = {(f.asym, f.axis) for f in (getattr(c.layer, half) for c in CASES) if f.quantized}
        assert kinds == {(asym, axis) for asym in (False, True) for axis in (0, 1)}, half
    assert any(c.layer.key.hadamard for c in CASES)
    assert {c.machine["late_copies"] for c in CASES} == {0, 1}
    assert {min(c.machine["order"], 2) for c in CASES} == {0, 1, 2}
    assert {c.machine["merge_apart"] for c in CASES} == {False, True}


PLAIN = Case(layer_of((4, True, 1, 32), (4, True, 0, 64), 64), torch.float16, 4, 1, 64, {})


@pytest.mark.parametrize("dtype, size", [(torch.float16, 1e4), (torch.bfloat16, 1e30), (torch.float16, 1e-5)])
def test_queries_of_any_size(dtype, size):
    """Queries times scales of keys would overflow float16."""
    case = Case(PLAIN.layer, dtype, 4, 1, 0, {})
    model = cache_of(case, lengths=(640,))
    plan = model.planner.plan([1], [640], [1])
    q = (model.random(1, 4, 64) * size).to(dtype)
    k, v = model.rows(1)[:, 0].unbind(1)
    scaling = 0.125 / size
    expected = naive_attention(
        q, *(torch.cat([model.seen(model.requests[1], 0, half), x.float()]) for half, x in enumerate((k, v))), scaling
    )
    error = (model.kernels.attend(0, plan, q, k, v, scaling).double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() <= TOLERANCE


@pytest.mark.parametrize("half", ("key", "value"))
def test_a_page_with_nan_is_seen_in_the_result(half):
    model = cache_of(PLAIN, lengths=(640,))
    stored = getattr(model.storage.layers[0], half)
    page = model.table.pages[1][3]
    stored.pages[page, 0, stored.format.code_bytes : stored.format.code_bytes + 2] = torch.tensor([0x00, 0x7E])
    plan = model.planner.plan([1], [640], [1])
    k, v = model.rows(1)[:, 0].unbind(1)
    out = model.kernels.attend(0, plan, model.random(1, 4, 64).to(torch.float16), k, v, 0.125)
    assert out.isnan().any()


def test_padded_requests_have_zeros():
    model = cache_of(PLAIN, lengths=(640,))
    plan = model.planner.plan([1, 0], [640, 0], [1, 1])
    plan.prefix_lens[1] = -1
    k, v = model.rows(2)[:, 0].unbind(1)
    out = model.kernels.attend(0, plan, model.random(2, 4, 64).to(torch.float16), k, v, 0.125)
    assert out[0].isfinite().all() and (out[1] == 0).all()
    model.kernels.store(0, plan, k, v)
    assert model.storage.layers[0].key.ring[0].isnan().all(), "the padded row went into slot 0's ring"


def test_the_portable_fibers_do_the_same():
    library = build.load_library(PLAIN.layer, False, portable_fibers=True)
    assert decode(cache_of(PLAIN, lengths=(319,), library=library)) <= TOLERANCE


def test_python_knows_which_formats_are_served():
    source = "#include <sgl_kernel/kvtuner/cuda/decode_format.h>\n"
    served = []
    for i, (layer, bf16) in enumerate(random_layers(300)):
        served.append(supported(layer, bf16))
        source += build.layer_source(layer, bf16).replace("Layer", f"Layer{i}")
        source += f"static_assert(kvtuner::cuda::DecodeFormat<Layer{i}>::supported() == {str(served[-1]).lower()});\n"
    assert 50 < sum(served) < 250
    path = build.build_folder() / "formats.cpp"
    path.write_text(source)
    build.run(build.host_compiler(), "-std=c++17", "-fsyntax-only", f"-I{build.KERNELS / 'include'}", path)


def test_a_format_that_is_not_served_does_not_compile():
    with pytest.raises(build.BuildError, match="another kernel's"):
        build.build_library(layer_of((2, False, 0, 32), (4, False, 0, 64)), False)
