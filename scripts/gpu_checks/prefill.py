"""Check 8: extends, whose prefixes are dequantized into a workspace: one pass, rounds, and the torch reference."""

from __future__ import annotations

from gpu_checks import construction
from gpu_checks.attending import TOLERANCE
from gpu_checks.cache import Cache, Shape, row_error
from gpu_checks.device import Device
from gpu_checks.recipes import mixed_layers
from gpu_checks.report import Findings, NotRun

# A group per request: tokens before the chunk, and of it. In pages; one of the chunks ends within a page.
SMALL, FULL = ((5.4, 1.2), (1.1, 0.5)), ((40.3, 9.5), (0.0, 3.0), (12.5, 0.3), (2.0, 17.2))


def check(device: Device, findings: Findings) -> str:
    """One pass against the reference; rounds of a fifth of the prefixes against both."""
    layers = mixed_layers(device.small)
    page, heads = layers[0].key.page_size, (2, 1) if device.small else (32, 8)
    lengths = [(int(before * page), max(int(count * page), 2)) for before, count in (SMALL if device.small else FULL)]
    prefix_tokens = sum(before for before, _ in lengths)
    most = max(before + count for before, count in lengths) // page + 2
    shape = Shape(
        layers, *heads, residual=page + 3, dtype=device.dtypes[0], num_slots=len(lengths) + 1,
        num_pages=most * len(lengths) + 2, max_pages=most,
    )  # fmt: skip
    cache = Cache(device, shape, seed=6, workspace_tokens=prefix_tokens)
    for slot, (before, _) in enumerate(lengths, start=1):
        cache.begin(slot)
        if before:
            cache.extend(slot, before)
    slots, counts = list(range(1, len(lengths) + 1)), [count for _, count in lengths]
    plan, expected_plan = cache.plan_extend(slots, counts)
    rows = cache.rows(sum(counts))
    variants = construction.prefill_variants(
        cache.storage,
        heads=heads[0],
        most_pages=most,
        one_pass=prefix_tokens + sum(counts),
        in_rounds=prefix_tokens // 5,
    )
    reference = [
        cache.reference.attend(layer, expected_plan, rows.q[layer].float(), rows.k[layer], rows.v[layer], cache.scaling)
        for layer in range(len(layers))
    ]
    ran, absent = [], []
    for name, kernels in variants.items():
        if isinstance(kernels, str):
            absent.append(f"{name}: {kernels}")
            continue
        try:
            worst = 0.0
            for layer, theirs in enumerate(reference):
                out = kernels.attend(
                    layer, kernels.plan(plan), rows.q[layer], rows.k[layer], rows.v[layer], cache.scaling
                )
                worst = max(worst, row_error(out, theirs))
        except ImportError as e:
            absent.append(f"{name}: {e}")
            continue
        findings.record("variants", {"variant": name, "row_error": worst, "tolerance": TOLERANCE[shape.dtype]})
        findings.expect(worst <= TOLERANCE[shape.dtype], f"{name}: a row is off by {worst:.1e} of its norm")
        ran.append(name)
    if not ran:
        raise NotRun(f"attention of extends is upstream's kernel: {absent[0]}")
    if absent:
        findings.numbers["absent"] = absent
    return f"{', '.join(ran)}: {prefix_tokens} tokens of prefixes, {sum(counts)} queries" + (
        f" (not importable: {'; '.join(absent)})" if absent else ""
    )
