"""The CUDA kernels as nvcc compiles them, on the PTX machine: what the host machine cannot see is inline PTX and the compiler."""

import pytest
import torch

from harness.device.build import load_library
from harness.device.cases import Case, layer_of
from harness.device.faults import INCLUDE, Fault
from harness.device.nvidia import compiler
from harness.device.ptx.library import PtxLibrary
from harness.device.steps import TOLERANCE, cache_of, decode

LENGTHS = (319, 2)
APART = {"merge_apart": True, "splits": 2}
CASES = {
    "K4V4": Case(layer_of((4, False, 0, 64), (4, False, 0, 64)), torch.float16, 4, 1, 64, {}),
    "channels": Case(layer_of((8, True, 1, 32), (2, True, 1, 64), 64, sinks=4), torch.bfloat16, 3, 1, 64, APART),
    "rotated": Case(layer_of((2, True, 0, 64, "rotated"), (8, True, 0, 32), 64), torch.float16, 9, 1, 0, {}),
    "16 bits": Case(layer_of((16, False, 0, 64), (16, False, 0, 64), 64), torch.float16, 4, 1, 64, {}),
}


def on_ptx(case, kernels=None):
    compiler()
    bf16 = case.dtype == torch.bfloat16
    library = PtxLibrary(case.layer, bf16, load_library(case.layer, bf16), kernels)
    return cache_of(case, LENGTHS, library=library)


@pytest.mark.parametrize("name", CASES)
def test_decode_step(name):
    assert decode(on_ptx(CASES[name])) <= TOLERANCE


@pytest.mark.parametrize("name", ("K4V4", "rotated"))
def test_both_machines_agree(name):
    """Beyond the rounding of the result and multiplications that nvcc contracts."""
    case = CASES[name]
    bf16 = case.dtype == torch.bfloat16
    results = []
    for model in (on_ptx(case), cache_of(case, LENGTHS, library=load_library(case.layer, bf16))):
        plan = model.planner.plan([1, 2], LENGTHS, [1, 1])
        generator = torch.Generator().manual_seed(1)
        q, k, v = (
            torch.randn(2, heads, model.head_dim, generator=generator).to(case.dtype) for heads in (case.group, 1, 1)
        )
        results.append(model.kernels.attend(0, plan, q, k, v, 0.1).double())
    assert (results[0] - results[1]).norm() <= 4e-4 * results[1].norm()


FAULTS = (
    Fault("halves are packed the other way", INCLUDE + "intrinsics_ptx.h", '"f"(high), "f"(low)', '"f"(low), "f"(high)', ""),
    Fault("registers of an operand of mma are exchanged", INCLUDE + "intrinsics_ptx.h", "{%4,%5,%6,%7}", "{%4,%6,%5,%7}", ""),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_in_inline_ptx_is_found(tmp_path, fault):
    assert not decode(on_ptx(CASES["rotated"], fault.plant(tmp_path)), check=False) <= TOLERANCE
