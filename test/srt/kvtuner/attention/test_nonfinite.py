"""NaN, infinite and huge keys and values: stored alike by every implementation, visible to whoever reads them, counted."""

import pytest
import torch

from harness.formats import SHAPES, all_formats, tensor_format
from harness.kernels import make_case
from sglang.srt.kvtuner.format.page_codec import pack_pages, unpack_pages

PAGE_FORMATS = all_formats(SHAPES)


def damaged(fmt, generator):
    """Pages with elements that are NaN or infinite here and there, of every sign, and elements up to the ends of float32."""
    x = torch.randn(4, fmt.page_size, fmt.head_dim, generator=generator)
    for page in (1, 2):
        for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            token, channel = (int(torch.randint(n, (), generator=generator)) for n in x.shape[1:])
            x[page, token, channel] = value
    x[2] *= torch.logspace(-30, 38, fmt.head_dim)
    x[3, :, 0] = torch.logspace(0, 38, fmt.page_size)
    return x


@pytest.mark.parametrize("bits", ("K2", "K4", "K8", "K16", "V2", "V4", "V8", "V16"))
def test_packed_bytes_of_damaged_and_huge_pages_equal_the_definition(kernels, bits):
    for name, fmt in PAGE_FORMATS.items():
        if name.startswith(bits + "-"):
            generator = torch.Generator().manual_seed(fmt.head_dim)
            inputs = [damaged(fmt, generator)]
            for largest in (1e30, 3e38):
                signs = torch.rand(2, fmt.page_size, fmt.head_dim, generator=generator) * 2 - 1
                inputs += [signs * largest, signs.sign() * largest, signs.abs() * largest]
            for x in inputs:
                for dtype in (torch.float32, torch.bfloat16):
                    packed, expected = kernels.pack_pages(x.to(dtype), fmt), pack_pages(x.to(dtype), fmt)
                    assert torch.equal(packed, expected), (fmt, x.abs().max(), dtype)


def test_a_damaged_group_is_stored_as_nan(kernels):
    for asym, axis in ((False, 0), (True, 0), (False, 1), (True, 1)):
        fmt = tensor_format(4, asym, axis, 16, 64, 64, True)
        x = torch.randn(1, 64, 64)
        x[0, 20, 5] = torch.inf
        block = kernels.pack_pages(x, fmt)
        scale = block[0, fmt.code_bytes : fmt.code_bytes + fmt.scale_bytes].view(torch.int16)
        assert (scale == 0x7E00).sum() == 1
        values = unpack_pages(block, fmt)[0]
        group = (20, slice(0, 16)) if axis == 0 else (slice(16, 32), 5)
        assert values[group].isnan().all() and values.isnan().sum() == 16


DAMAGED_FORMATS = {
    f"K{key}V{value}-{'asym' if asym else 'sym'}-{axes[0]}{axes[1]}": (
        tensor_format(key, asym, axes[0], 32, 64, 64, True, rotated),
        tensor_format(value, asym, axes[1], 32, 64, 64, False),
    )
    for key, value, asym, axes, rotated in [
        (4, 4, False, (0, 0), False),
        (4, 4, True, (1, 0), False),
        (8, 2, False, (1, 1), False),
        (2, 8, True, (0, 1), True),
        (8, 4, False, (0, 0), True),
        (16, 16, False, (0, 0), False),
    ]
}


@pytest.mark.parametrize("where, sinks", [("page", 0), ("page", 4), ("ring", 0), ("own rows", 4)])
@pytest.mark.parametrize("half", [0, 1], ids="KV")
@pytest.mark.parametrize("formats", DAMAGED_FORMATS)
def test_nan_shows_in_the_requests_that_read_it(kernels, formats, half, where, sinks):
    """One element of request 2 is NaN. In every later step its rows have NaN in the head that reads it, the other requests'
    rows and the other head's none."""
    key, value = DAMAGED_FORMATS[formats]
    model = make_case(kernels, key, value, 6, 2, 64, sinks=sinks, lengths=(150, 0, 300))
    length, position = {"page": (200, 70), "ring": (200, 195), "own rows": (130, 135)}[where]
    rows = model.rows(length + 20)
    rows[position, 0, half, 1, 17] = torch.nan
    model.step((2, length), attend=False, new=rows[:length])
    assert model.storage.nonfinite_blocks.tolist() == [1 if where == "page" else 0]
    counts = (1, 20, 1)
    new = torch.cat([model.rows(1), rows[length:], model.rows(1)])
    for slot, count in enumerate(counts, start=1):
        model.table.extend(slot, len(model.requests[slot]) + count)
    plan = model.kernels.plan(model.planner.plan([1, 2, 3], [len(model.requests[slot]) for slot in (1, 2, 3)], counts))
    k, v = new[:, 0].unbind(1)
    out = model.kernels.attend(0, plan, torch.randn(22, 6, 64), k, v, 0.125)
    damaged_rows = out.isnan().any(-1)
    assert damaged_rows[1 + max(position - length, 0) : 21, 3:].all(), "in every row that sees it"
    assert not damaged_rows[:, :3].any() and not damaged_rows[[0, 21]].any()


def test_nonfinite_blocks_are_counted(kernels):
    """Blocks of a page, head, and K or V, whatever is damaged in them; rows that are not packed yet do not count."""
    key, value = tensor_format(4, False, 0, 64, 64, 64, True), tensor_format(16, False, 0, 64, 64, 64, False)
    model = make_case(kernels, key, value, 2, 2, 64, lengths=(0, 0))
    first, second = model.rows(200), model.rows(64)
    first[3, 0, 0, 0] = torch.nan
    first[4, 0, 0, 0, 7] = torch.inf
    first[100, 0, 1, 1, 2] = -torch.inf
    first[199, 0] = torch.nan
    second[0, 0] = torch.inf
    model.step((1, 200), (2, 64), attend=False, new=torch.cat([first, second]))
    assert model.storage.nonfinite_blocks.tolist() == [2 + 4]
    model.step((1, 56), attend=False)
    assert model.storage.nonfinite_blocks.tolist() == [6 + 4]
