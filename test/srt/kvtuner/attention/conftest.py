"""The kernels that the tests of this folder run on."""

import pytest

from harness.kernels import IMPLEMENTATIONS, cpu_kernels, triton_kernels
from sglang.srt.kvtuner.attention.cpu import CpuKernels
from sglang.srt.kvtuner.attention.triton import TritonKernels


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def kernels(request):
    """An implementation, with the environment that chooses it."""
    found, environment = IMPLEMENTATIONS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield {CpuKernels: cpu_kernels, TritonKernels: triton_kernels}.get(found, lambda: found)()
