"""What is the Triton kernels' own: rounds of an extend, plans on the device, damage that shows. test_triton.py runs them."""

from dataclasses import replace

import pytest
import torch

from harness.cache_model import CacheModel
from harness.formats import mixed_layers, tensor_format
from harness.peak import peak_memory
from sglang.srt.kvtuner.attention import dispatch, triton_compile, triton_extend
from sglang.srt.kvtuner.attention import triton as triton_kernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.attention.steps import StepPlan, StepPlanner
from sglang.srt.kvtuner.attention.triton import TritonKernels, interpreted
from sglang.srt.kvtuner.attention.triton_planner import TritonPlanner
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.page_codec import pack_pages

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported: test_triton.py runs these tests so"
)


def make_model(formats=None, heads=3, kv_heads=1, residual=40, dtype=torch.float32, lengths=(300, 30), **settings):
    formats = mixed_layers(16, sinks=4) if formats is None else formats
    model = CacheModel(
        TritonKernels, formats, heads=heads, kv_heads=kv_heads, residual=residual, dtype=dtype, **settings
    )
    model.fill = ReferenceKernels(model.storage)
    for slot, length in enumerate(lengths, start=1):
        model.begin(slot)
        model.step((slot, length), attend=False)
    return model


def attend_twice(model, first, second, counts, layer):
    """Outputs of two kernels over the same cache and the same new rows."""
    slots, prefix_lens = [1, 2], [len(model.requests[slot]) for slot in (1, 2)]
    for slot, length, count in zip(slots, prefix_lens, counts, strict=True):
        model.table.extend(slot, length + count)
    step = model.planner.plan(slots, prefix_lens, counts)
    q = torch.randn(sum(counts), model.heads, model.head_dim)
    k, v = torch.randn(2, sum(counts), model.kv_heads, model.head_dim)
    return [kernels.attend(layer, kernels.plan(step), q, k, v, 0.2) for kernels in (first, second)]


@pytest.mark.parametrize("tokens", [82, 329], ids=lambda n: f"workspace-{n}")
def test_rounds_give_what_one_pass_gives(tokens, monkeypatch):
    """330 tokens of two prefixes, four times the smallest workspace; windows begin within pages, and one within sinks. The first
    block of queries ends within the first request's."""
    monkeypatch.setattr(triton_extend, "QUERY_BLOCK", 16)
    model = make_model()
    rounds = TritonKernels(model.storage, replace(model.workload, workspace_tokens=tokens))
    for layer in range(3):
        one_pass, in_rounds = attend_twice(model, model.kernels, rounds, [20, 7], layer)
        assert (one_pass - in_rounds).norm(dim=-1).max() <= 1e-5 * one_pass.norm(dim=-1).max()


def test_blocks_read_the_prefixes_of_their_requests_alone(monkeypatch):
    monkeypatch.setattr(triton_extend, "QUERY_BLOCK", 16)
    model = make_model(lengths=())
    plan = triton_extend.ExtendPlan.of(model.planner.plan([1, 2, 3], [32, 0, 48], [16, 20, 3]))
    blocks = [(b.start, b.end, b.prefix_start, b.prefix_end) for b in plan.blocks()]
    assert blocks == [(0, 16, 0, 32), (16, 32, 32, 32), (32, 39, 32, 80)]
    assert (plan.prefix_tokens, plan.most_prefix) == (80, 48)


def counted(model):
    """Bytes by use."""
    return {use.name: use.bytes(model.storage.num_slots) for use in TritonKernels.memory(model.workload)}


def held(*holders):
    """Bytes of the tensors that are attributes of objects."""
    return sum(value.nbytes for holder in holders for value in vars(holder).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (torch.float16, 2)])
@pytest.mark.parametrize("slots", [2, 1500])
def test_what_is_counted_is_what_is_allocated(slots, dtype, itemsize):
    model = make_model(heads=6, kv_heads=2, dtype=dtype, lengths=(), num_slots=slots, workspace_tokens=2000)
    uses = counted(model)
    assert uses["prefill workspace of 2000 tokens"] == 2 * 2000 * 2 * 64 * itemsize
    buffers = held(model.kernels, model.kernels._workspace, model.planner, model.planner.rings)
    assert buffers - held(model.table) == sum(uses.values()) - uses["prefill plans"]


@pytest.mark.parametrize("length", [64, 256, 496])
def test_a_prefill_takes_what_is_counted_whatever_the_prefix(length, monkeypatch):
    """Kernels, planner, plan and attention of every layer, up to eight times the workspace."""
    monkeypatch.setattr(triton_extend, "QUERY_BLOCK", 32)
    model = make_model(lengths=(length,), workspace_tokens=64)
    q, k, v = torch.randn(10, 3, 64), *torch.randn(2, 10, 1, 64)
    model.table.extend(1, length + 10)
    settings = {"page_size": 16, "residual_length": 40}
    table = {"req_to_token": model.table.req_to_token, "req_generation": model.table.req_generation}
    found = []

    def prefill():
        kernels = TritonKernels(model.storage, model.workload)
        planner = TritonPlanner(**settings, **table)
        step = planner.plan([1], [length], [10])
        plan = kernels.plan(step)
        found[:] = step, [kernels.attend(layer, plan, q, k, v, 0.1) for layer in range(3)]

    taken = peak_memory(prefill) - 3 * q.nbytes
    uses = counted(model)
    assert 0 <= sum(uses.values()) - taken <= uses["prefill plans"]
    step, outputs = found
    one_pass = TritonKernels(model.storage, replace(model.workload, workspace_tokens=512))
    for layer, out in enumerate(outputs):
        expected = one_pass.attend(layer, one_pass.plan(step), q, k, v, 0.1)
        assert (out - expected).norm(dim=-1).max() <= 1e-5 * expected.norm(dim=-1).max()


def test_a_decode_step_takes_nothing_but_its_result():
    model = make_model(lengths=(100, 30))
    slots, seq_lens = torch.tensor([1, 2]), torch.tensor([101, 31])
    for slot, length in zip(slots.tolist(), seq_lens.tolist(), strict=True):
        model.table.extend(slot, length)
    q, k, v = torch.randn(2, 3, 64), *torch.randn(2, 2, 1, 64)

    def decode():
        plan = model.kernels.plan(model.planner.plan_decode(slots, seq_lens))
        model.kernels.attend(0, plan, q, k, v, 0.1)
        model.kernels.store(0, plan, k, v)

    assert peak_memory(decode) == q.nbytes


@pytest.mark.parametrize("multiprocessors", [1, 64, 128, 132, 170, 400])
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (8, 2), (20, 1), (64, 1), (64, 64), (96, 2)])
def test_parts_of_every_decode_step_have_room(heads, kv_heads, multiprocessors, monkeypatch):
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: multiprocessors)
    fixed, per_slot = triton_kernels._parts(heads, kv_heads)
    blocks = triton_kernels._head_blocks(heads, kv_heads)
    for slots in (1, 2, 9, 100, 700, 5000):
        splits = [triton_kernels.decode_splits(rows * blocks, torch.device("cpu")) for rows in range(1, slots + 1)]
        most = max(rows * (count + 1) for rows, count in enumerate(splits, start=1))
        assert most <= fixed + slots * per_slot <= 2 * (most + 512 // kv_heads)


def test_more_requests_than_there_are_slots_are_refused():
    model = make_model(lengths=(), num_slots=2)
    rows = model.kernels._part_lse.shape[0]  # far more, whatever the number of splits
    q, k, v = torch.zeros(rows, 3, 64), *torch.zeros(2, rows, 1, 64)
    plan = StepPlan(
        torch.zeros(rows), torch.zeros(rows + 1), torch.zeros(rows), torch.zeros(rows), torch.zeros(rows, 1), 1
    )
    with pytest.raises(ValueError, match=f"a decode step of {rows} requests, 3 heads"):
        model.kernels.attend(0, plan, q, k, v, 0.1)


@pytest.mark.parametrize("half", ["key", "value"])
@pytest.mark.parametrize("count", [1, 9], ids=["decode", "extend"])
def test_a_damaged_group_shows(half, count):
    """The row that reads it is NaN, the other request's is not."""
    model = make_model(
        (LayerFormat(tensor_format(4, True, 0, 16, 16, 64, True), tensor_format(8, False, 0, 64, 16, 64, False)),)
    )
    stored = getattr(model.storage.layers[0], half)
    x = torch.randn(1, 16, 64)
    x[0, 5, 3] = float("nan")
    stored.pages[model.table.pages[1][2]] = pack_pages(x, stored.format)
    for slot in (1, 2):
        model.table.extend(slot, len(model.requests[slot]) + count)
    plan = model.kernels.plan(model.planner.plan([1, 2], [300, 30], [count, count]))
    q, k, v = torch.randn(2 * count, 3, 64), *torch.randn(2, 2 * count, 1, 64)
    out = model.kernels.attend(0, plan, q, k, v, 0.1)
    assert out[:count].isnan().flatten(1).any(1).all() and out[count:].isfinite().all()


@pytest.mark.parametrize("token_lanes", [True, False])
@pytest.mark.parametrize(
    "nbits, asym, axis, group", [(2, True, 0, 48), (4, False, 1, 48), (8, True, 1, 16), (4, True, 0, 80)]
)
def test_packing_of_groups_that_are_no_powers_of_two_and_of_damage(nbits, asym, axis, group, token_lanes):
    fmt = tensor_format(nbits, asym, axis, group, 48, 80 if group == 80 else 96, token_lanes)
    x = torch.randn(4, fmt.page_size, fmt.head_dim)
    x[1, 3, 7], x[1, -1, -1], x[2, 0, 0] = float("nan"), float("inf"), float("-inf")
    x[3] = x[3] * 1e30 + 3e38
    assert torch.equal(TritonKernels.pack_pages(x, fmt), pack_pages(x, fmt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_16_bit_pages_round_half_to_even(dtype):
    fmt = TensorFormat.unquantized(16, 64, True)
    x = torch.randn(2, 16, 64) * torch.logspace(-42, 4, 64)
    x[0, 0] = 1 + 2.0**-9 * torch.arange(64)  # ties among them
    x[1, 1, :2] = torch.tensor([float("inf"), float("-inf")])
    x = x.to(dtype)
    assert torch.equal(TritonKernels.pack_pages(x, fmt), pack_pages(x, fmt))


def test_decode_plans_are_what_the_torch_planner_makes():
    model = make_model(lengths=(300, 32))
    model.begin(3, prefix_of=1, prefix_pages=2)
    model.step((3, 1))
    planner, slots, seq_lens = model.planner, torch.tensor([1, 0, 3, 2]), torch.tensor([320, 1, 34, 33])
    model.table.extend(1, 320)
    ours, expected = planner.plan_decode(slots, seq_lens, 320), StepPlanner.plan_decode(planner, slots, seq_lens)
    for name in ("slots", "query_start", "prefix_lens", "packed_end"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    assert ours.packed_end.tolist() == [272, 0, 32, 0]
    for row, seq_len in enumerate(seq_lens.tolist()):
        assert torch.equal(ours.pages[row, : seq_len // 16], expected.pages[row, : seq_len // 16])


def test_decode_plans_keep_their_addresses():
    model = make_model(lengths=(20,))
    planner = model.planner
    planner.allocate(8)
    plans = [
        planner.plan_decode(torch.tensor(slots), torch.ones(len(slots), dtype=torch.int64)) for slots in ([1], [0] * 8)
    ]
    planner.allocate(4)
    for name in ("query_start", "prefix_lens", "packed_end", "pages"):
        assert len({getattr(plan, name).data_ptr() for plan in plans}) == 1, name
    with pytest.raises(ValueError, match="9 requests; the planner has room for 8"):
        planner.plan_decode(torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.int64))


def test_decode_reads_the_plan_of_the_device():
    """Steps planned by plan_decode, padded with slot 0, against the reference; what they leave is what the model expects."""
    model = make_model(lengths=(47, 63))
    reference = ReferenceKernels(model.storage)
    for slot in (1, 2):
        model.table.extend(slot, len(model.requests[slot]) + 1)
    step = model.planner.plan_decode(torch.tensor([1, 2, 0]), torch.tensor([48, 64, 1]))
    new = model.rows(3)
    for layer in range(3):
        q, (k, v) = torch.randn(3, 3, 64), new[:, layer].unbind(1)
        out, expected = (
            kernels.attend(layer, kernels.plan(step), q, k, v, 0.125) for kernels in (model.kernels, reference)
        )
        assert (out - expected).norm(dim=-1).max() <= 1e-5 * expected.norm(dim=-1).min()
        model.kernels.store(layer, model.kernels.plan(step), k, v)
    for slot in (1, 2):
        request, before = model.requests[slot], len(model.requests[slot])
        request.tokens = torch.cat([request.tokens, new[slot - 1 : slot]])
        model._expect_pages(slot, before, before + 1)
    model.check()


@pytest.mark.parametrize("heads, kv_heads", [(16, 1), (20, 1), (4, 4)])
def test_query_heads_of_a_group(heads, kv_heads):
    formats = (LayerFormat(tensor_format(4, True, 1, 16, 16, 64, True), tensor_format(4, True, 0, 64, 16, 64, False)),)
    model = make_model(formats, heads, kv_heads, lengths=(100, 3))
    assert model.step((1, 1), (2, 1)) <= 1e-5
    model.check()


def test_trials_before_serving_leave_no_trace():
    """In a cache that holds requests: padding's ring is zeros as before, nothing else is written."""
    model = make_model(mixed_layers(16, sinks=4)[1:2], lengths=(47, 63))
    model.step((1, 1), (2, 1))
    buffers = [x for half in model.storage.keys + model.storage.values for x in (half.pages, half.ring, half.sinks)]
    before = [x.clone() for x in buffers]
    triton_compile.try_kernels(model.kernels, model.planner, 3, workspace_tokens=32)
    assert all(torch.equal(x, y) for x, y in zip(before, buffers, strict=True))
    assert not model.storage.layers[0].key.ring[0].any()
    assert model.step((1, 1), (2, 2)) <= 1e-5
    model.check()


def test_chosen_on_a_cpu_by_name_alone(monkeypatch):
    formats = mixed_layers(16)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.choose_kernels("cpu", formats) == (TritonKernels, ())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        dispatch.choose_kernels("cpu", formats)


def test_formats_are_refused_with_the_reason():
    rows = tensor_format(4, False, 0, 8, 8, 24, True)
    assert (
        TritonKernels.supports(LayerFormat(rows, rows))
        == "pages of 8 tokens and heads of 24 do not fill vectors at 4 bits"
    )
    large = tensor_format(4, False, 0, 64, 64, 512, True)
    assert TritonKernels.supports(LayerFormat(large, large)) == "heads of 512 are larger than 256"
    long = tensor_format(4, False, 0, 64, 256, 128, True)
    reason = "pages of 256 tokens with heads of 128 are larger than 16384 elements"
    assert TritonKernels.supports(LayerFormat(long, long)) == reason
