#!/usr/bin/env python3
"""Times the quantized cache's kernels on this card: attention as a share of copy bandwidth, storing, steps with and without graphs.

    python scripts/gpu_bench.py --json found.json    # needs torch, triton and a GPU, not sglang

Attention is timed with a cold L2 cache, in a graph, so that the host's time is not in it. Shares are of the bandwidth of a copy
measured in the same run. --json keeps every sample. docs/gpu_checks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import gpu_check
from gpu_checks import report

CHOICE = 0  # of --splits: the kernels' own


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times the quantized cache's kernels on this card.")
    parser.add_argument(
        "--recipe", default="", metavar="TEXT", help="recipes whose name contains it, such as '4ac64'; default: all"
    )
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 32768], metavar="TOKENS")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="REQUESTS")
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[CHOICE, 1, 4, 16], choices=(CHOICE, 1, 2, 4, 8, 16, 32), metavar="N",
        help=f"parts of the packed pages, powers of two up to 32; {CHOICE} leaves the choice to the kernels",
    )  # fmt: skip
    parser.add_argument("--heads", type=int, default=32, help="query heads of a rank")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads of a rank")
    parser.add_argument(
        "--layers", type=int, default=32, help="of the stack whose steps are timed with and without a graph"
    )
    parser.add_argument("--repeats", type=int, default=30, help="samples of each figure; medians are printed")
    parser.add_argument("--json", metavar="FILE", help="write device, versions and every sample there")
    options = parser.parse_args(arguments)
    for name in ("context", "batch"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name} is {min(getattr(options, name))}; valid are 1 and more")
    for name in ("heads", "kv_heads", "layers", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; valid are 1 and more")
    if options.heads % options.kv_heads:
        parser.error(f"--heads is {options.heads}; valid are multiples of --kv-heads, {options.kv_heads}")
    return options


def measure(device: Any, options: argparse.Namespace, copy_bytes: int | None = None) -> dict[str, Any]:
    """All figures; prints each as it comes. copy_bytes: of the copy that gives the bandwidth. Raises ValueError where no recipe
    has the wanted name."""
    import torch

    from gpu_checks import bandwidth
    from gpu_checks.recipes import recipes

    chosen = [recipe for recipe in recipes(device.small) if options.recipe in recipe.name]
    if not chosen:
        names = "; ".join(recipe.name for recipe in recipes(device.small))
        raise ValueError(f"--recipe is {options.recipe!r}; valid is a part of one of these: {names}")
    setting = bandwidth.Setting(
        options.heads, options.kv_heads, options.repeats, options.layers, copy_bytes or bandwidth.COPY_BYTES
    )
    speed, samples = bandwidth.copy_bandwidth(device, setting)
    print(f"copy: {speed / 1e9:.0f} GB/s read and written\n")
    print(
        f"{'recipe':44} {'context':>8} {'batch':>5} {'splits':>6} {'us':>9} {'of copy':>7} {'store us':>9} {'pack us':>9}"
    )
    shapes = list(itertools.product(chosen, options.context, options.batch))
    readings, stacks, left_out = [], [], []
    for (recipe, context, batch), splits in itertools.product(shapes, options.splits):
        device.free_bytes()  # what the measurement before had goes back
        shape = {"context": context, "batch": batch, "setting": setting}
        try:
            r = bandwidth.read(device, recipe, **shape, splits=splits or None, bandwidth=speed)
        except (torch.OutOfMemoryError, ValueError) as e:
            left_out.append(_left_out(f"{recipe.name} in {splits or 'as many as chosen'} parts", context, batch, e))
            continue
        readings.append(dataclasses.asdict(r) | {"chosen_by_kernels": splits == CHOICE})
        mark = "*" if splits == CHOICE else ""
        print(
            f"{r.recipe:44} {context:8} {batch:5} {mark + str(r.splits):>6} {r.seconds * 1e6:9.1f} {r.share:7.2f} "
            f"{r.store_seconds * 1e6:9.1f} {r.pack_seconds * 1e6:9.1f}",
            flush=True,
        )
    print(f"\n{options.layers} layers, attention and storing alone; * above: the kernels' choice")
    columns = ("launches", "host us", "eager us", "graph us")
    print(f"{'recipe':44} {'context':>8} {'batch':>5} {' '.join(f'{column:>9}' for column in columns)} {'ratio':>6}")
    for recipe, context, batch in shapes:
        device.free_bytes()
        try:
            s = bandwidth.stack(device, recipe, context=context, batch=batch, setting=setting)
        except torch.OutOfMemoryError as e:
            left_out.append(_left_out(f"{options.layers} layers of {recipe.name}", context, batch, e))
            continue
        stacks.append(dataclasses.asdict(s))
        launches = "-" if s.launches is None else s.launches
        print(
            f"{s.recipe:44} {context:8} {batch:5} {launches:>9} {s.host_seconds * 1e6:9.1f} {s.eager_seconds * 1e6:9.1f} "
            f"{s.graph_seconds * 1e6:9.1f} {s.ratio:6.2f}",
            flush=True,
        )
    return {
        "copy_bytes_per_second": speed,
        "copy_samples": samples,
        "attention": readings,
        "stacks": stacks,
        "left_out": left_out,
    }


def _left_out(what: str, context: int, batch: int, reason: Exception) -> str:
    why = reason if isinstance(reason, ValueError) else "the device has too little memory"
    said = f"{what} at context {context}, batch {batch}: {report.NOT_RUN}: {why}"
    print(said, flush=True)
    return said


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        device = gpu_check.prepare(gpu_check.parse([]))
    except (ImportError, RuntimeError) as e:
        print(f"{report.NOT_RUN}: {e}", file=sys.stderr)
        return report.INCOMPLETE
    from gpu_checks import environment

    about = environment.describe(device)
    print(environment.line(about))
    try:
        found = measure(device, options)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    if options.json:
        found = {"environment": about, "settings": vars(options), **found}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return report.PASSED


if __name__ == "__main__":
    sys.exit(main())
