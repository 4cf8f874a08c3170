"""Check 3: decode attention of every recipe against the torch reference, and what the step leaves in the buffers."""

from __future__ import annotations

import torch

from gpu_checks.cache import PADDING, Cache, Shape, row_error, same_plan
from gpu_checks.device import Device
from gpu_checks.recipes import DTYPES, HEADS, layer_format, recipes, short_name
from gpu_checks.report import Findings
from sglang.srt.kvtuner.format.formats import LayerFormat

# Error of an output row relative to its norm. Rounding the operands of products and the output to the model's dtype, in torch and
# on these inputs, gives up to 4.3e-3 in bfloat16 and 3.7e-4 in float16 over a hundred rows; small rows have more.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}
LONGEST = 32 * 1024


def check(device: Device, findings: Findings) -> str:
    """Every recipe in every dtype with 8 KV heads (1 in the small mode), then every group size with one recipe."""
    chosen = recipes(device.small)
    default = (3, 1) if device.small else (32, 8)
    cases = []
    for recipe in chosen:
        for dtype in dict.fromkeys((*device.dtypes, *([] if device.small else [DTYPES[recipe.dtype]]))):
            case = (short_name(recipe), layer_format(recipe), default, dtype)
            if case[1:] not in [known[1:] for known in cases]:  # recipes of the table may differ in dtype alone
                cases.append(case)
    for heads in HEADS[4:5] if device.small else HEADS:
        recipe = chosen[0] if device.small else chosen[1]
        cases.append(
            (f"{short_name(recipe)}, {heads[0]}/{heads[1]} heads", layer_format(recipe), heads, device.dtypes[0])
        )
    worst = 0.0
    for name, layer, heads, dtype in cases:
        worst = max(
            worst, _check_case(device, findings, f"{name}, {str(dtype)[6:]}", layer, heads, dtype) / TOLERANCE[dtype]
        )
    return f"{len(cases)} cases, the largest error is {worst:.0%} of the tolerance; buffers bit for bit"


def lengths(page: int, residual: int, small: bool) -> list[int]:
    """Tokens before the step that are edges of pages, of the residual window, and of splits."""
    edges = {0, page - 2, page - 1, page, page + 1, residual - 1, residual, residual + 1, residual + page}
    return [*sorted(edges), *([] if small else [2000, LONGEST - 1])]


def _check_case(
    device: Device, findings: Findings, name: str, layer: LayerFormat, heads: tuple[int, int], dtype: torch.dtype
) -> float:
    page = layer.key.page_size
    residual = page + 3 if device.small else 2 * page
    of_request = lengths(page, residual, device.small)
    found = [(2, 1), (2, residual + page - 1)]  # pages from the prefix cache, tokens behind them
    most = max(of_request) // page + 2
    cache = Cache(
        device,
        Shape(
            (layer,), *heads, residual, dtype, num_slots=len(of_request) + len(found) + 3,
            num_pages=sum(n // page + 2 for n in of_request) + 16, max_pages=most + 8,
        ),
    )  # fmt: skip
    slots = list(range(1, len(of_request) + 1))
    for slot, length in zip(slots, of_request, strict=True):
        cache.begin(slot)
        if length:
            cache.extend(slot, length)
        else:  # a request's first step is always an extend, for which its slot changes hands
            cache.planner.plan([slot], [0], [1])
    for pages, more in found:
        slots.append(len(slots) + 1)
        cache.begin(slots[-1], prefix_of=slots[len(of_request) - 1], prefix_pages=pages)
        cache.extend(slots[-1], more)
    rows = [*slots, PADDING, PADDING]
    step, expected = cache.planner.plan_decode(*cache.decode_inputs(rows)), cache.expected_plan(rows, [1] * len(rows))
    wrong = same_plan(step, expected, page)
    findings.expect(wrong is None, f"{name}: the plan's {wrong}")
    (ours,), (theirs,) = cache.decode(rows)
    error = row_error(ours, theirs)
    findings.record("cases", {"case": name, "row_error": error, "tolerance": TOLERANCE[dtype]})
    findings.expect(error <= TOLERANCE[dtype], f"{name}: a row is off by {error:.1e} of its norm")
    for difference in cache.differences():
        findings.expect(False, f"{name}: {difference} differ after the step")
    return error
