"""nvcc compiles the CUDA kernels for every architecture, and none of them spills registers."""

import pytest

from harness.device.cases import layer_of
from harness.device.nvidia import ARCHITECTURES, page_loop, resources

# The formats that need most, beside the plainest one.
LAYERS = {
    "K4V4": (layer_of((4, False, 0, 64), (4, False, 0, 64)), False),
    "K8V4, channels of values": (layer_of((8, True, 0, 64), (4, True, 1, 64)), False),
    "K4V4, channels of keys, groups of 32": (layer_of((4, True, 1, 32), (4, True, 0, 32)), True),
    "K8V8, heads of 256, rotated": (layer_of((8, False, 0, 64, "rotated"), (8, False, 0, 64), 256), True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_kernel_spills(name):
    found = resources(*LAYERS[name])
    kernels = {"decode_kernel", "merge_kernel", "store_kernel", "store_rows_kernel"}
    assert found.keys() == {(a, k) for a in ARCHITECTURES for k in kernels}
    assert not {kernel: numbers for kernel, numbers in found.items() if numbers[1]}
    assert all(registers <= 255 for registers, _ in found.values())


@pytest.mark.parametrize("architecture", ("sm_89", "sm_90"))
def test_instructions_of_a_page(architecture):
    """Memory bounds the kernel as long as a page's instructions take less time than its bytes."""
    products = 64  # 32 for keys, 32 for values: heads lie along N
    loop = page_loop(*LAYERS["K4V4"], architecture, products)
    assert sum("HMMA" in instruction for instruction in loop) == products
    assert len(loop) <= 1250
