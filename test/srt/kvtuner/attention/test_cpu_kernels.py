"""What the C++ kernels have beside the interface of all kernels."""

from dataclasses import replace

import pytest
import torch

from harness.cache_model import CacheModel
from harness.formats import all_formats, tensor_format
from harness.kernels import cpu_kernels
from sglang.kernels.ops.attention.kvtuner import cpu as cpu_ops
from sglang.srt.kvtuner.attention.cpu import CpuKernels, check_fields, code_places
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.attention.steps import StepPlan
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.layout import VectorLayout
from sglang.srt.kvtuner.format.page_codec import split_blocks


def test_formats_are_refused_with_the_reason():
    fmt = tensor_format(4, False, 0, 8, 8, 24, True)
    assert "divide by 16" in CpuKernels.supports(LayerFormat(fmt, fmt))
    rows = replace(tensor_format(2, False, 1, 8, 64, 64, True), axis=1)
    assert CpuKernels.supports(LayerFormat(rows, rows)) == "groups of 8 at 2 bits do not fill vectors"
    assert ReferenceKernels.supports(LayerFormat(fmt, TensorFormat.unquantized(8, 24))) is None


def test_cpp_places_codes_and_scales_where_the_layout_says():
    """Of every format whose codes lie in vectors; kernels refuse some of them for their groups."""
    cpu_kernels()
    formats = [fmt for fmt in all_formats().values() if isinstance(fmt.layout, VectorLayout)]
    assert len(formats) > 200
    for fmt in formats:
        token = torch.arange(fmt.page_size)[:, None].expand(-1, fmt.head_dim)
        channel = torch.arange(fmt.head_dim).expand(fmt.page_size, -1)
        byte, shift, parameter = code_places(fmt)
        assert torch.equal(byte, fmt.layout.byte_of(token, channel)), fmt
        assert torch.equal(shift, fmt.layout.shift_of(token, channel)), fmt
        if fmt.quantized:
            groups = torch.arange(fmt.scale_bytes // 2, dtype=torch.int16).view(torch.uint8)
            block = torch.cat([torch.zeros(fmt.code_bytes, dtype=torch.uint8), groups, groups[: fmt.zero_bytes]])
            scale = split_blocks(block, fmt)[1].view(torch.int16).long()
            expected = scale.repeat_interleave(fmt.group_size, dim=1 - fmt.axis)
            assert torch.equal(parameter, expected), fmt


def test_cpp_and_python_name_the_same_fields():
    cpu_kernels()
    names = {name: list(fields) for name, fields in cpu_ops.module().field_names().items()}
    check_fields(names)
    assert names["StepPlan"] == ["slots", "query_start", "prefix_lens", "packed_end", "pages"]
    for change in ({"StepPlan": names["StepPlan"][::-1]}, {"TensorFormat": names["TensorFormat"][:-1]}):
        with pytest.raises(RuntimeError, match=f"{next(iter(change))} has the fields"):
            check_fields(names | change)


def test_a_layer_and_a_step_are_checked_when_they_are_made():
    kernels = cpu_kernels()
    layer = LayerFormat(tensor_format(4, True, 0, 64, 64, 64, True), tensor_format(4, True, 0, 64, 64, 64, False))
    model = CacheModel(kernels, (layer,), heads=2, kv_heads=2, residual=0, num_slots=2, num_pages=4)
    good = StepPlan(
        slots=torch.tensor([1]),
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        prefix_lens=torch.tensor([130], dtype=torch.int32),
        packed_end=torch.tensor([128], dtype=torch.int32),
        pages=torch.tensor([[1, 3]], dtype=torch.int32),
        most_queries=1,
    )
    model.kernels.plan(good)
    for fault, changed in {
        "there is no page 4": {"pages": torch.tensor([[1, 4]], dtype=torch.int32)},
        "no slot": {"slots": torch.tensor([2])},
        "neither in pages nor in its ring": {"packed_end": torch.tensor([0], dtype=torch.int32)},
        "differ in length": {"prefix_lens": torch.tensor([130, 1], dtype=torch.int32)},
        "query_start must be contiguous, of 32-bit integers": {"query_start": torch.tensor([0, 1])},
    }.items():
        with pytest.raises(ValueError, match=fault):
            model.kernels.plan(replace(good, **changed))
    key = model.storage.layers[0].key
    for fault, changed in {
        "pages are not blocks": {"pages": key.pages[..., :-1].contiguous()},
        "rings must be contiguous": {"ring": key.ring.transpose(1, 2)},
        "does not fit the buffers": {"format": layer.value},
    }.items():
        layers = (replace(model.storage.layers[0], key=replace(key, **changed)),)
        with pytest.raises(ValueError, match=fault):
            kernels(replace(model.storage, layers=layers))
    rows = torch.randn(1, 2, 64)
    with pytest.raises(ValueError, match="k does not fit the cache"):
        model.kernels.attend(0, model.kernels.plan(good), rows, rows[:, :1], rows, 0.125)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    cpu_kernels()
    monkeypatch.setenv("SGLANG_KVTUNER_CPU_ISA", "neon")
    with pytest.raises(ValueError, match="neon"):
        cpu_ops.module().body_name()


def test_read_pages_reads_every_block_of_the_step():
    kernels = cpu_kernels()
    layer = LayerFormat(tensor_format(2, True, 0, 64, 64, 64, True), tensor_format(8, True, 1, 16, 64, 64, False))
    model = CacheModel(kernels, (layer,), heads=2, kv_heads=2, residual=0)
    for slot, length in ((1, 130), (2, 30), (3, 200)):
        model.begin(slot)
        model.step((slot, length), attend=False)

    def checksum(blocks):
        whole = blocks.shape[-1] // 64 * 64
        words = blocks[..., :whole].contiguous().view(torch.int64)
        return words.sum() + blocks[..., whole:].long().sum()

    pages = [page for slot, count in ((1, 2), (3, 3)) for page in model.table.pages[slot][:count]]
    assert model.storage.layers[0].key.pages.shape[-1] % 64 == 0 and len(pages) == 5
    expected = sum(checksum(half.pages[pages]) for half in (model.storage.layers[0].key, model.storage.layers[0].value))
    plan = model.kernels.plan(model.planner.plan([1, 2, 3], [130, 30, 200], [1, 1, 1]))
    assert model.kernels.read_pages(0, plan) == expected.item()
