"""Check 1: every kernel of every recipe compiles for this device, and its driver loads it."""

from __future__ import annotations

import time

import torch

from gpu_checks.device import Device
from gpu_checks.report import Findings
from triton_resources import RECIPES, build, kernels, plain_kernels


def check(device: Device, findings: Findings) -> str:
    """Registers, spilled registers, bytes of shared memory, and seconds to compile and load, per kernel."""
    major, minor = torch.cuda.get_device_capability(device.device)
    most_shared = torch.cuda.get_device_properties(device.device).shared_memory_per_block_optin
    work = [(recipe.name, recipe.dtype, kernel) for recipe in RECIPES for kernel in kernels(recipe)]
    work += [(f"head_dim {dim}", "bf16", kernel) for dim in (128, 256) for kernel in plain_kernels(dim)]
    for recipe, dtype, (name, kernel, constants, options) in work:
        start = time.perf_counter()
        try:
            compiled = build(kernel, constants, options, dtype, 10 * major + minor)
            compiled[(1,)]  # loads it, and launches nothing
        except Exception as e:
            findings.expect(False, f"{name} of {recipe}: {type(e).__name__}: {e}")
            continue
        numbers = {
            "recipe": recipe,
            "kernel": name,
            "registers": compiled.n_regs,
            "spilled": compiled.n_spills,
            "shared_bytes": compiled.metadata.shared,
            "seconds": time.perf_counter() - start,
        }
        findings.record("kernels", numbers)
        findings.expect(compiled.n_spills == 0, f"{name} of {recipe} spills {compiled.n_spills} registers")
        findings.expect(
            compiled.metadata.shared <= most_shared,
            f"{name} of {recipe} wants {compiled.metadata.shared} bytes of shared memory, the device has {most_shared}",
        )
    found = findings.numbers.get("kernels", [])
    slowest = max((k["seconds"] for k in found), default=0.0)
    registers = max((k["registers"] for k in found), default=0)
    return f"{len(found)} kernels for sm_{major}{minor}, no spills, at most {registers} registers, {slowest:.1f} s each at most"
