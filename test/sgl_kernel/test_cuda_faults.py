"""A test of the tests of the CUDA kernels: faults planted in their sources are found."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from harness.chosen import chosen_values
from harness.device.build import build_library, machine_objects, open_library
from harness.device.cases import Case, layer_of
from harness.device.faults import FAULTS
from harness.device.steps import TOLERANCE, cache_of, decode

CASE = Case(layer_of((4, True, 0, 32), (4, True, 0, 64), 64, sinks=4), torch.float16, 4, 1, 64, {})
LENGTHS = (958, 63, 319, 2)  # pages of every warp are refilled; first pages are packed with their sinks


def finding(library, **machine):
    """What is wrong, or None."""
    model = cache_of(CASE, LENGTHS, library=library, **machine)
    try:
        error = decode(model, check=False)
    except AssertionError as e:
        return str(e)
    if not error <= TOLERANCE:
        return f"error {error}"
    try:
        model.check()
    except AssertionError:
        return "bytes"
    return None


@pytest.fixture(scope="module")
def libraries(request, tmp_path_factory):
    """Futures of the builds with a fault, by its name; the compiler has one thread, so there is a build for every core."""
    machine_objects(False)

    def build(fault):
        return build_library(CASE.layer, False, kernels=fault.plant(tmp_path_factory.mktemp("fault")))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {fault.name: pool.submit(build, fault) for fault in chosen_values(request, "fault")}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found(libraries, fault):
    library = open_library(libraries[fault.name].result())
    found = finding(library, **dict(fault.machine))
    assert found and re.search(fault.found_by, found), found


def test_nothing_is_found_without_a_fault():
    library = open_library(build_library(CASE.layer, False))
    for machine in {fault.machine for fault in FAULTS}:
        assert finding(library, **dict(machine)) is None
