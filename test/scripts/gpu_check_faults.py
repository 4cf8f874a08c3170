"""Run by test_gpu_check.py in the interpreter: checks with faults planted in what they check. Prints verdicts as JSON."""

import contextlib
import json
from types import SimpleNamespace
from unittest import mock

import torch

import gpu_bench
import gpu_check

OPTIONS = gpu_check.parse(["--interpret"])
DEVICE = gpu_check.prepare(OPTIONS)

from gpu_checks import (  # noqa: E402
    attending,
    bandwidth,
    compiled,
    construction,
    device,
    fence,
    graphs,
    packing,
    pools,
    registry,
    report,
)
from gpu_checks.recipes import recipes  # noqa: E402
from sglang.srt.kvtuner.cache.residual_window import RingOwners  # noqa: E402

pack_pages, make_kernels, capture = construction.pack_pages, construction.make_kernels, DEVICE.capture
# Less than the small mode has.
LITTLE = (
    mock.patch.object(device, "WARM_UPS", 1),
    mock.patch.object(construction, "chosen_splits", lambda *_: 1),
    mock.patch.object(construction.triton_kernels, "decode_splits", lambda *_: 1),
    mock.patch.object(attending, "recipes", lambda small: recipes(True)[:1]),
    mock.patch.object(packing, "recipes", lambda small: recipes(True)[:1]),
    mock.patch.object(attending, "HEADS", ()),
    mock.patch.object(DEVICE, "dtypes", (torch.float32,), create=True),
    mock.patch.object(pools, "pools", lambda device, all=pools.pools: list(all(device))[:1]),
)


def wrong_byte(x, fmt):
    blocks = pack_pages(x, fmt)
    blocks[0, 5] ^= 1
    return blocks


def no_such_kernel(x, fmt):
    raise RuntimeError("no such kernel")


def kernels_with(change):
    """make_kernels with a change of what it makes."""

    def made(storage, **settings):
        kernels = make_kernels(storage, **settings)
        change(kernels)
        return kernels

    return mock.patch.object(construction, "make_kernels", made)


def another_scaling(kernels):
    attend = kernels.attend
    kernels.attend = lambda layer, plan, q, k, v, scaling: attend(layer, plan, q, k, v, scaling * 1.05)


def no_ring_row(kernels):
    store = kernels.store

    def stored(layer, plan, k, v):
        store(layer, plan, k, v)
        half = kernels.storage.layers[layer].key
        half.ring[plan.slots[0], plan.prefix_lens[0] % kernels.storage.ring_length] = 0

    kernels.store = stored


def a_byte_behind(kernels):
    store = kernels.store

    def stored(layer, plan, k, v):
        store(layer, plan, k, v)
        pages = kernels.storage.layers[layer].key.pages
        pages.as_strided((1,), (1,), pages.storage_offset() + pages.numel()).fill_(7)

    kernels.store = stored


def capture_once(function):
    """A graph in which the host's first values are frozen: it replays nothing else."""
    capture(function)
    return lambda: None


def capture_late(*arguments):
    return graphs.capture(*arguments[:4], late_plan=True)


class Compiled:
    """What Triton's compiler gives, as far as the check looks at it; loading is an index."""

    metadata = SimpleNamespace(shared=4096)
    n_regs = 100

    def __init__(self, spills):
        self.n_spills = spills

    def __getitem__(self, grid):
        return None


def compiled_with(spills, most_shared=1 << 16):
    """A card of sm_90, and a compiler in whose kernels so many registers spill."""
    return (
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(
            torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(shared_memory_per_block_optin=most_shared)
        ),
        mock.patch.object(compiled, "build", lambda *_: Compiled(spills)),
    )


def verdict(name, *faults):
    """Of a check, by the program where it may run without a GPU."""
    with contextlib.ExitStack() as patches:
        for patch in (*LITTLE, *faults):
            patches.enter_context(patch)
        check = {
            "compile": lambda found: compiled.check(DEVICE, found),
            "graphs": lambda found: graphs.check(DEVICE, found, (1, 2), 4),
            "fence": lambda found: fence.check(DEVICE, found),
            "bandwidth": lambda found: bandwidth.check(DEVICE, found),
        }.get(name)
        if check is None:
            kept = []
            run = registry.Check.run
            patches.enter_context(
                mock.patch.object(registry.Check, "run", lambda self, device: kept.append(run(self, DEVICE)) or kept[0])
            )
            status = gpu_check.main(["--interpret", "--only", name])
            return {"status": status, "verdict": kept[0].verdict, "summary": kept[0].summary}
        result = report.run(name, check)
        status = report.exit_status([result])
        return {"status": status, "verdict": result.verdict, "summary": result.summary, **result.numbers}


def main():
    no_ring_starts = mock.patch.object(RingOwners, "take_over", lambda *_, **__: None)
    found = {
        "compile: spills": verdict("compile", *compiled_with(4)),
        "compile: more shared memory than there is": verdict("compile", *compiled_with(0, 1024)),
        "compile: no fault": verdict("compile", *compiled_with(0)),
        "pack: a wrong byte": verdict("pack", mock.patch.object(construction, "pack_pages", wrong_byte)),
        "pack: a kernel that raises": verdict("pack", mock.patch.object(construction, "pack_pages", no_such_kernel)),
        "attend: another scaling": verdict("attend", kernels_with(another_scaling)),
        "attend: ring starts ignored": verdict("attend", no_ring_starts),
        "attend: a ring row not stored": verdict("attend", kernels_with(no_ring_row)),
        "pools: a byte behind the pages": verdict("pools", kernels_with(a_byte_behind)),
        "slots: ring starts ignored": verdict("slots", no_ring_starts),
        "graphs: inputs frozen at capture": verdict("graphs", mock.patch.object(DEVICE, "capture", capture_once)),
        "fence: layers that read the table late": verdict("fence", mock.patch.object(fence, "capture", capture_late)),
        "fence: nobody overwrites": verdict("fence", mock.patch.object(fence, "overwrite", lambda *_: None)),
        "graphs: no fault": verdict("graphs"),
        "fence: no fault": verdict("fence"),
        "bandwidth: no fault": verdict("bandwidth"),
    }
    flags = "--recipe 4sc16 --context 80 --batch 1 --splits 0 --heads 2 --kv-heads 1 --layers 1 --repeats 1"
    with LITTLE[0], LITTLE[1], LITTLE[2]:
        found["benchmark"] = gpu_bench.measure(DEVICE, gpu_bench.parse(flags.split()), copy_bytes=1 << 20)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
