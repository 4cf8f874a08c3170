"""Check 9, and what gpu_bench.py measures: attention as a share of copy bandwidth, storing, whole steps with and without graphs."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field

import torch

from gpu_checks import construction
from gpu_checks.device import Device
from gpu_checks.filled import Filled
from gpu_checks.recipes import DTYPES, layer_format, recipes, short_name
from gpu_checks.report import Findings
from triton_resources import RECIPES, Recipe

COPY_BYTES = 1 << 30
# Reading alone can be somewhat faster than copying; more than this was not read from memory.
MOST_SHARE = 1.3


@dataclass(frozen=True)
class Setting:
    """heads, kv_heads: of a rank. repeats: samples of a figure. layers: of a stack. copy_bytes: of the copy that gives the bandwidth."""

    heads: int = 32
    kv_heads: int = 8
    repeats: int = 30
    layers: int = 32
    copy_bytes: int = COPY_BYTES


@dataclass(frozen=True)
class Reading:
    """Attention of one layer in one decode step; median of samples in seconds, and bytes of pages and ring rows per second as a
    share of copy bandwidth."""

    recipe: str
    context: int
    batch: int
    splits: int
    seconds: float
    share: float
    store_seconds: float
    pack_seconds: float
    bytes: int
    samples: dict[str, list[float]] = field(repr=False)


@dataclass(frozen=True)
class Stack:
    """A decode step of a stack of layers, attention and storing alone; medians in seconds. host: to launch it. ratio: eager to
    graph, from the launch until the device is done."""

    recipe: str
    context: int
    batch: int
    layers: int
    eager_seconds: float
    graph_seconds: float
    ratio: float
    host_seconds: float
    host_graph_seconds: float
    launches: int | None
    samples: dict[str, list[float]] = field(repr=False)


def copy_bandwidth(device: Device, setting: Setting) -> tuple[float, list[float]]:
    """Bytes per second that a copy reads and writes, and the seconds of each."""
    source = torch.empty(setting.copy_bytes, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    samples = device.cold_samples(lambda: target.copy_(source), setting.repeats)
    return 2 * setting.copy_bytes / statistics.median(samples), samples


def read(
    device: Device, recipe: Recipe, *, context: int, batch: int, splits: int | None, bandwidth: float, setting: Setting
) -> Reading:
    """Measure with ``splits`` parts, None for the kernels' choice. bandwidth: bytes per second of a copy."""
    page = recipe.key.page_size
    shape = {"batch": batch, "heads": setting.heads, "kv_heads": setting.kv_heads, "residual": 2 * page}
    dtype = DTYPES[recipe.dtype] if device.gpu else torch.float32
    layers = [layer_format(recipe)]
    whole = -(-context // page) * page  # its last token completes a page
    filled = Filled(device, layers, context=context, dtype=dtype, splits=splits, **shape)
    samples = {"attend": device.cold_samples(device.capture(filled.attend), setting.repeats)}
    size = filled.bytes_read()
    for name, length in (("store", whole - 1), ("store and pack", whole)):
        filled.seq_lens.fill_(length)
        filled.plan = filled.kernels.plan(filled.planner.plan_decode(filled.slots, filled.seq_lens))
        samples[name] = device.cold_samples(device.capture(filled.store), setting.repeats)
    median = {name: statistics.median(of) for name, of in samples.items()}
    programs = batch * setting.kv_heads * -(-setting.heads // setting.kv_heads // 16)
    return Reading(
        recipe=short_name(recipe),
        context=context,
        batch=batch,
        splits=construction.chosen_splits(programs, device.device) if splits is None else splits,
        seconds=median["attend"],
        share=size / median["attend"] / bandwidth,
        store_seconds=median["store"],
        pack_seconds=median["store and pack"],
        bytes=size,
        samples=samples,
    )


def stack(device: Device, recipe: Recipe, *, context: int, batch: int, setting: Setting) -> Stack:
    """Measure decode steps of ``setting.layers`` layers with and without a graph."""
    dtype = DTYPES[recipe.dtype] if device.gpu else torch.float32
    filled = Filled(
        device, [layer_format(recipe)] * setting.layers, context=context, batch=batch, heads=setting.heads,
        kv_heads=setting.kv_heads, residual=2 * recipe.key.page_size, dtype=dtype,
    )  # fmt: skip
    replay = device.capture(filled.step)
    samples = {}
    for name, function in (("eager", filled.step), ("graph", replay)):
        samples[f"{name} host"] = device.host_samples(function, setting.repeats)
        samples[name] = device.wall_samples(function, setting.repeats)
    median = {name: statistics.median(of) for name, of in samples.items()}
    return Stack(
        recipe=short_name(recipe),
        context=context,
        batch=batch,
        layers=setting.layers,
        eager_seconds=median["eager"],
        graph_seconds=median["graph"],
        ratio=median["eager"] / median["graph"],
        host_seconds=median["eager host"],
        host_graph_seconds=median["graph host"],
        launches=device.launches(filled.step),
        samples=samples,
    )


def check(device: Device, findings: Findings) -> str:
    """A few of gpu_bench.py's figures. There is no least speed: what must hold is that they can be."""
    setting = (
        Setting(heads=2, kv_heads=1, repeats=1, layers=2, copy_bytes=1 << 20) if device.small else Setting(repeats=10)
    )
    bandwidth, samples = copy_bandwidth(device, setting)
    findings.numbers.update(copy_bytes_per_second=bandwidth, copy_samples=samples)
    context, batch = (96, 1) if device.small else (16384, 8)
    recipe = recipes(True)[0] if device.small else RECIPES[1]
    readings = [
        read(device, recipe, context=context, batch=batch, splits=splits, bandwidth=bandwidth, setting=setting)
        for splits in (None, 1, 4)
    ]
    for reading in readings:
        findings.record("readings", asdict(reading))
        findings.expect(
            0 < reading.share <= MOST_SHARE or not device.gpu,
            f"{reading.splits} splits read at {reading.share:.2f} of copy bandwidth: that was not memory",
        )
    whole = stack(device, recipe, context=context, batch=1, setting=setting)
    findings.numbers["stack"] = asdict(whole)
    findings.expect(whole.graph_seconds > 0, "a graph's step took no time")
    return (
        f"copy {bandwidth / 1e9:.0f} GB/s; {recipe.name}: {readings[0].share:.0%} of it with {readings[0].splits} splits; "
        f"a step of {whole.layers} layers: {whole.launches} launches, {whole.host_seconds * 1e6:.0f} us of the host, "
        f"{whole.ratio:.1f} x as long without a graph"
    )
