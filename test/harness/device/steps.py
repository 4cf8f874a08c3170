"""A cache whose decode steps the host machine runs."""

from harness.cache_model import CacheModel
from harness.device.cases import LENGTHS
from harness.device.kernels import DeviceKernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels

# Of an output row relative to its norm, against float64 on the same codes.
TOLERANCE = 4e-3


def cache_of(case, lengths=LENGTHS, **options):
    """A request of each length in slots 1, 2, …, filled by the reference."""
    model = CacheModel(
        lambda storage, workload: DeviceKernels(storage, workload, **{**case.machine, **options}),
        (case.layer,),
        heads=case.group * case.kv_heads,
        kv_heads=case.kv_heads,
        residual=case.residual,
        dtype=case.dtype,
        num_slots=len(lengths) + 1,
    )
    model.fill = ReferenceKernels(model.storage)
    model.begin_all(lengths)
    return model


def decode(model, check=True):
    """One token for every request; the largest error. Raises AssertionError for what the machine found, for packed bytes and
    rows that differ."""
    error = model.step(*((slot, 1) for slot in model.requests))
    if check:
        model.check()
    return error
