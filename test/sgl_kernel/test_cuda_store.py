"""The CUDA store kernels on the host machine: chunks of any length, and what is not finite."""

import pytest
import torch

from harness.cache_model import CacheModel
from harness.device.cases import layer_of
from harness.device.kernels import DeviceKernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels

LAYER = layer_of((4, True, 0, 32, "rotated"), (2, False, 1, 64), 64, sinks=4)


def cache(make_kernels, layer=LAYER, dtype=torch.bfloat16):
    return CacheModel(make_kernels, (layer,), heads=2, kv_heads=2, residual=64, dtype=dtype)


@pytest.mark.parametrize(
    "lengths, counts",
    [([0, 0], [131, 7]), ([192, 67], [70, 129]), ([450, 129, 64], [1, 65, 64]), ([100], [400])],
    ids=("first chunk", "later chunk", "mixed batch", "longer than the ring"),
)
def test_extend(lengths, counts):
    model = cache(DeviceKernels)
    model.kernels.attend = None  # chunks are attended by others
    for slot, length in enumerate(lengths, start=1):
        model.begin(slot)
        if length:
            model.step((slot, length), attend=False)
    model.step(*enumerate(counts, start=1), attend=False)
    model.check()


@pytest.mark.parametrize("bits", (4, 16))
def test_what_is_not_finite_is_stored_as_the_definition_has_it_and_counted(bits):
    layer = layer_of((bits, bits != 16, 0, 64), (bits, False, 0, 64), 64)
    models = [cache(make, layer) for make in (DeviceKernels, ReferenceKernels)]
    new = models[0].rows(192)
    new[5, 0, 0, 0, 3], new[70, 0, 1, 1, 9], new[71, 0, 1, 1, 60] = torch.nan, torch.inf, -torch.inf
    for model in models:
        model.begin(1)
        model.step((1, 192), attend=False, new=new.clone())
    ours, expected = (model.storage for model in models)
    assert ours.nonfinite_blocks.item() == expected.nonfinite_blocks.item() == 2
    for half in ("key", "value"):
        assert torch.equal(getattr(ours.layers[0], half).pages, getattr(expected.layers[0], half).pages)
