"""Check 2: the kernels pack pages to the bytes of the codec (format/page_codec.py)."""

from __future__ import annotations

import torch

from gpu_checks import construction
from gpu_checks.device import Device
from gpu_checks.recipes import DTYPES, recipes, short_name
from gpu_checks.report import Findings
from sglang.srt.kvtuner.format import page_codec
from sglang.srt.kvtuner.format.formats import TensorFormat


def check(device: Device, findings: Findings) -> str:
    """Every format of the recipes, on inputs that rounding, division and damage show up in, from every dtype of a model."""
    formats: dict[TensorFormat, str] = {}
    for recipe in recipes(device.small):
        for half, fmt in (("K", recipe.key), ("V", recipe.value)):
            formats.setdefault(fmt, f"{half} of {short_name(recipe)}")
    pages = 0
    for number, (fmt, name) in enumerate(formats.items()):
        # What is packed is float32 from its first instruction on, so that some formats from float16 are enough.
        for dtype in ("fp32", "bf16", *["fp16"] * (number < 4 and not device.small)):
            cases = inputs(fmt, 1 if device.small else 16)
            names = list(cases)[:: 1 if dtype == "fp32" or not device.small else 3]
            x = torch.cat([cases[case] for case in names]).to(DTYPES[dtype])
            # On the host: what torch divides there is rounded to nearest, whatever flags a device was built with.
            expected = page_codec.pack_pages(x, fmt)
            ours = construction.pack_pages(x.to(device.device), fmt).cpu()
            wrong = (ours != expected).view(len(names), -1).sum(1).tolist()
            for case, count in zip(names, wrong, strict=True):
                findings.expect(not count, f"{name} from {dtype}, {case}: {count} bytes differ")
            findings.record("formats", {"format": name, "dtype": dtype, "bytes_that_differ": dict(zip(names, wrong))})
            pages += x.shape[0]
    return f"{pages} pages of {len(formats)} formats, every byte as the codec has it"


def inputs(fmt: TensorFormat, count: int) -> dict[str, torch.Tensor]:
    """Pages by name, float32 [count, page_size, head_dim]."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, fmt.page_size, fmt.head_dim)
    normal = torch.randn(shape, generator=generator)
    channel = torch.arange(fmt.head_dim)
    signs = torch.where((torch.arange(fmt.page_size)[:, None] + channel) % 2 == 0, 0.0, -0.0)
    ties = (torch.randint(-8, 8, shape, generator=generator) + 0.5) / 4
    broken = normal.clone()
    broken[:, 1, 2], broken[:, -1, -1], broken[:, 3, 0] = float("nan"), float("inf"), float("-inf")
    subnormal = normal * torch.logspace(-44, -36, fmt.head_dim)
    return {
        "normal": normal,
        "constant": torch.full(shape, 0.3),
        "huge offset": normal + 5000,
        "channels of many sizes": normal * torch.logspace(-4, 4, fmt.head_dim),
        "subnormal": subnormal,
        "zeros of both signs": signs.expand(shape).clone(),
        "ties": ties,
        "the largest": normal.clamp(-1, 1) * 6e4,
        "NaN and infinite": broken,
    }
