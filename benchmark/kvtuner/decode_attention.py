#!/usr/bin/env python3
"""Times decode attention over the packed cache, against bfloat16 pages in the same layout and upstream's path.

Every variant is first checked against float32 attention over the same codes. Variants and plain reading take turns within
one run, each on buffers that do not fit the caches of the processor together, so that ratios hold on a machine that does
other work too; medians are printed. Run it with OMP_NUM_THREADS set, and OMP_PROC_BIND=true OMP_PLACES=cores on an idle machine:

    OMP_NUM_THREADS=2 python benchmark/kvtuner/decode_attention.py --gqa 3 --head-dim 64 --context 8192
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch

from sglang.kernels.ops.attention.kvtuner.cpu import module as cpu_module
from sglang.srt.kvtuner.attention.cpu import CpuKernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.attention.steps import StepPlan
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.hadamard import block_size
from sglang.srt.kvtuner.format.quantizer import STORED_BITS, UNQUANTIZED_BITS

PAGE = 64
BUFFER_BYTES = 96 << 20  # more than the last-level caches of the machines that this runs on
TOLERANCE = 5e-3  # float32 rows; the tests hold formats to less
DISTINCT_PAGES = 64


@dataclass(frozen=True)
class Result:
    """One variant at one shape. seconds, best: median and shortest time of a call. bytes: packed K and V that it reads.

    Ratios and bandwidth are of medians; ratio_of_best compares shortest times, which other processes disturb less.
    fraction_of_page_bandwidth: of that at which the same pages are read in the same order without computing; None where
    there are no pages.
    """

    variant: str
    context: int
    batch: int
    seconds: float
    bytes: int
    bandwidth: float
    fraction_of_read_bandwidth: float
    fraction_of_page_bandwidth: float | None
    ratio_to_bfloat16: float
    best: float
    ratio_of_best: float
    error: float


class Shape:
    """Sequences of one length, and the step that adds a token to each: what all variants share."""

    def __init__(self, options: argparse.Namespace, context: int, batch: int) -> None:
        self.context, self.batch, self.kv_heads, self.head_dim = context, batch, options.kv_heads, options.head_dim
        self.dtype, self.residual_length = options.dtype, options.residual_length
        self.scaling = options.head_dim**-0.5
        prefix_len = context - 1
        self.packed = max((prefix_len - options.residual_length) // PAGE, 0)
        self.q = torch.randn(batch, options.gqa * self.kv_heads, self.head_dim).to(options.dtype)
        self.k, self.v = torch.randn(2, batch, self.kv_heads, self.head_dim).to(options.dtype)
        whole = context // PAGE  # pages of a request after the step, in random order
        self.num_pages = whole * batch + 1
        self.step = StepPlan(
            slots=torch.arange(batch),
            query_start=torch.arange(batch + 1, dtype=torch.int32),
            prefix_lens=torch.full((batch,), prefix_len, dtype=torch.int32),
            packed_end=torch.full((batch,), self.packed * PAGE, dtype=torch.int32),
            pages=(torch.randperm(whole * batch) + 1).to(torch.int32).view(batch, whole),
            most_queries=1,
        )


class Packed:
    """The kernels over pages of a format; the layers of its cache are copies of one that do not fit the processor's caches
    together, and take turns."""

    def __init__(self, shape: Shape, layer: LayerFormat, label: str) -> None:
        self.shape, self.label = shape, label
        halves = (layer.key, layer.value)
        self.bytes = sum(fmt.block_bytes for fmt in halves) * shape.packed * shape.batch * shape.kv_heads
        copies = max(2, -(-BUFFER_BYTES // max(self.bytes, 1 << 20)))
        self.storage = CacheStorage.allocate(
            [layer] * copies,
            num_pages=shape.num_pages,
            num_slots=shape.batch,
            ring_length=(-(-shape.residual_length // PAGE) + 1) * PAGE,
            residual_length=shape.residual_length,
            kv_heads=shape.kv_heads,
            dtype=shape.dtype,
            device="cpu",
        )
        blocks = [CpuKernels.pack_pages(torch.randn(DISTINCT_PAGES, PAGE, shape.head_dim), fmt) for fmt in halves]
        which = torch.randint(DISTINCT_PAGES, (2, shape.num_pages, shape.kv_heads))
        rings = [
            torch.randn(stored.ring.shape) for stored in (self.storage.layers[0].key, self.storage.layers[0].value)
        ]
        for buffers in self.storage.layers:
            for i, stored in enumerate((buffers.key, buffers.value)):
                stored.pages.copy_(blocks[i][which[i]])
                stored.ring.copy_(rings[i])
        self.kernels = CpuKernels(self.storage)
        self.plan = self.kernels.plan(shape.step)
        self.turn = 0

    def layer(self) -> int:
        """The layer that has not been used for longest."""
        self.turn += 1
        return self.turn % len(self.storage.layers)

    def read(self) -> None:
        self.kernels.read_pages(self.layer(), self.plan)

    def run(self) -> torch.Tensor:
        s = self.shape
        return self.kernels.attend(self.layer(), self.plan, s.q, s.k, s.v, s.scaling)

    def error(self) -> float:
        """Largest error of an output row relative to its norm, against the reference over the same pages."""
        s = self.shape
        expected = ReferenceKernels(self.storage).attend(0, s.step, s.q, s.k, s.v, s.scaling).float()
        return ((self.run().float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


class Upstream:
    """Upstream's attention on the CPU: gather a request's rows by slot, then torch's attention, one request at a time."""

    label = "upstream"
    read = None

    def __init__(self, shape: Shape) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        slots = shape.context * shape.batch
        self.shape, self.backend = shape, TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
        self.caches = torch.randn(2, slots, shape.kv_heads, shape.head_dim).bfloat16()
        self.table = torch.randperm(slots // PAGE)[:, None] * PAGE + torch.arange(PAGE)
        self.table = self.table.reshape(shape.batch, -1)
        self.bytes = self.caches.nbytes
        self.q = shape.q.bfloat16()
        self.out = torch.empty_like(self.q)

    def run(self) -> None:
        s = self.shape
        self.backend._run_sdpa_forward_decode(
            self.q, self.out, *self.caches, self.table, torch.arange(s.batch),
            torch.full((s.batch,), self.table.shape[1]), scaling=s.scaling, enable_gqa=s.q.shape[1] != s.kv_heads,
        )  # fmt: skip

    def error(self) -> float:
        return 0.0


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def layer_format(options: argparse.Namespace, bits_key: int, bits_value: int) -> LayerFormat:
    def fmt(bits: int, axis: int, token_lanes: bool) -> TensorFormat:
        if bits == UNQUANTIZED_BITS:
            return TensorFormat.unquantized(PAGE, options.head_dim, token_lanes)
        group = options.group_size if axis == 1 or options.group_size != -1 else options.head_dim
        hadamard = block_size(options.head_dim) if options.hadamard_key and token_lanes else 0
        return TensorFormat(bits, options.asym, axis, group, PAGE, options.head_dim, token_lanes, hadamard)

    return LayerFormat(fmt(bits_key, options.axis_key, True), fmt(bits_value, options.axis_value, False))


def measure(options: argparse.Namespace, context: int, batch: int) -> list[Result]:
    shape = Shape(options, context, batch)
    variants: list = [Packed(shape, layer_format(options, 16, 16), "bfloat16")]
    for key, value in options.bits:
        variants.append(Packed(shape, layer_format(options, key, value), f"K{key}V{value}"))
    if options.upstream:
        variants.append(Upstream(shape))
    errors = {v.label: v.error() for v in variants}
    for label, error in errors.items():
        if error > TOLERANCE:
            sys.exit(f"{label} is wrong at context {context}, batch {batch}: relative error {error:.2e}")
    memory = torch.ones(BUFFER_BYTES * 2 // 4, dtype=torch.float32)
    calls = {"memory": memory.sum}
    for v in variants:
        calls[v.label] = v.run
        if v.read:
            calls[f"{v.label} read"] = v.read
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(options.repeats):
        for name, call in calls.items():
            times[name].append(_timed(call))
    median = {name: statistics.median(t) for name, t in times.items()}
    return [
        Result(
            variant=v.label,
            context=context,
            batch=batch,
            seconds=median[v.label],
            bytes=v.bytes,
            bandwidth=v.bytes / median[v.label],
            fraction_of_read_bandwidth=v.bytes / median[v.label] / (memory.nbytes / median["memory"]),
            fraction_of_page_bandwidth=median[f"{v.label} read"] / median[v.label] if v.read else None,
            ratio_to_bfloat16=median[v.label] / median["bfloat16"],
            best=min(times[v.label]),
            ratio_of_best=min(times[v.label]) / min(times["bfloat16"]),
            error=errors[v.label],
        )
        for v in variants
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="the device whose kernels to time (cpu)")
    parser.add_argument("--bits-key", type=int, nargs="+", default=[4, 8, 2], choices=STORED_BITS, metavar="BITS")
    parser.add_argument(
        "--bits-value", type=int, nargs="+", choices=STORED_BITS, metavar="BITS", help="as many; default: the keys'"
    )
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--gqa", type=int, default=3, help="query heads of a KV head")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--context", type=int, nargs="+", default=[8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--hadamard-key", action="store_true", help="rotated keys, but for the 16-bit ones")
    parser.add_argument("--axis-key", type=int, default=0, choices=(0, 1))
    parser.add_argument("--axis-value", type=int, default=0, choices=(0, 1))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--residual-length", type=int, default=128)
    parser.add_argument(
        "--dtype", type=lambda name: getattr(torch, name), default=torch.float32, help="of q, k, v and rings"
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--no-upstream", dest="upstream", action="store_false", help="leave out upstream's path (slow)")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    values = options.bits_value or options.bits_key
    if len(values) != len(options.bits_key):
        parser.error("--bits-value needs as many widths as --bits-key")
    options.bits = list(zip(options.bits_key, values, strict=True))
    if options.device != "cpu":
        parser.error(f"there are no kernels for {options.device} yet")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    name, threads = cpu_module().body_name(), torch.get_num_threads()
    print(
        f"C++ ({name}), {threads} threads, head_dim {options.head_dim}, {options.kv_heads} KV heads, GQA {options.gqa}"
    )
    print(
        f"{'context':>8} {'batch':>5} {'variant':>9} {'us':>10} {'GB/s':>7} {'of read':>7} {'of pages':>8} {'of bf16':>7} {'best us':>10} {'of bf16':>7} {'error':>8}"
    )
    results = []
    for context in options.context:
        for batch in options.batch:
            for r in measure(options, context, batch):
                results.append(r)
                pages = "-" if r.fraction_of_page_bandwidth is None else f"{r.fraction_of_page_bandwidth:.2f}"
                print(
                    f"{context:8} {batch:5} {r.variant:>9} {r.seconds * 1e6:10.1f} {r.bandwidth / 1e9:7.1f} "
                    f"{r.fraction_of_read_bandwidth:7.2f} {pages:>8} {r.ratio_to_bfloat16:7.2f} {r.best * 1e6:10.1f} "
                    f"{r.ratio_of_best:7.2f} {r.error:8.1e}"
                )
    if options.json:
        settings = SimpleNamespace(**vars(options) | {"dtype": str(options.dtype)})
        with open(options.json, "w") as file:
            json.dump(
                {"settings": vars(settings), "body": name, "threads": threads, "results": [asdict(r) for r in results]},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
