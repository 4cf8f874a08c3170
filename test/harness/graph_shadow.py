"""A second cache that the torch reference keeps, step by step, beside the one that is tested."""

import torch

from harness.graph_tape import Tape
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.attention.steps import StepPlanner
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.format.formats import LayerFormat

TOLERANCE = 1e-5  # of a row's norm, in float32


class ShadowMismatch(AssertionError):
    """The cache attended to something else, or holds something else, than the reference."""


class ShadowCache:
    """Follows the kernels of an attention backend; make one before anything is captured, call :meth:`check` after every forward.

    Each layer's attention is compared within TOLERANCE, and everything that the cache holds byte for byte: packed pages, rings
    and sinks of all pages and slots but page 0 and slot 0, to which padded rows write. Steps get the q, k, v of the layer, so
    that differences do not add up.
    """

    def __init__(self, kernels, table):
        self._real = real = kernels.storage
        self._storage = CacheStorage.allocate(
            [_layer_format(layer) for layer in real.layers],
            num_pages=real.num_pages,
            num_slots=real.num_slots,
            ring_length=real.ring_length,
            residual_length=real.residual_length,
            kv_heads=real.kv_heads,
            dtype=real.dtype,
            device="cpu",
        )
        self._reference = ReferenceKernels(self._storage)
        self._planner = StepPlanner(
            page_size=real.page_size,
            residual_length=real.residual_length,
            req_to_token=table.req_to_token,
            req_generation=table.req_generation,
        )
        self._calls = {}
        self._attend, kernels.attend = kernels.attend, self._see

    def check(self, batch):
        """Raises ShadowMismatch where the step of ``batch``, which has been computed, differs from the reference's."""
        # Graphs of prefills break at attention, which runs as without them.
        decoded = Tape.replayed is not None and batch.forward_mode.is_decode()
        calls = Tape.replayed.notes if decoded else self._calls
        Tape.replayed = None
        if batch.forward_mode.is_decode():
            plan = self._planner.plan_decode(batch.req_pool_indices, batch.seq_lens)
        else:
            slots = batch.req_pool_indices.tolist()
            plan = self._planner.plan(slots, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)
        rows = int(plan.query_start[-1])
        what = f"{batch.forward_mode.name} of {[(r.slot, r.prefix_len, r.end) for r in plan.requests]} (slot, from, to)"
        for layer, (q, k, v, scaling, out) in sorted(calls.items()):
            q, k, v, out = (x[:rows] for x in (q, k, v, out))
            expected = self._reference.attend(layer, plan, q, k, v, scaling)
            error = ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).nan_to_num(float("inf")).max().item()
            if error > TOLERANCE:
                raise ShadowMismatch(f"{what}: attention of layer {layer} is off by {error:.2g} of its norm")
            self._reference.store(layer, plan, k, v)
        assert len(calls) == len(self._real.layers)
        for layer, pair in enumerate(zip(self._real.layers, self._storage.layers, strict=True)):
            for half in ("key", "value"):
                for buffer in ("ring", "pages", "sinks"):
                    real, shadow = (getattr(getattr(x, half), buffer)[1:] for x in pair)
                    if not torch.equal(real, shadow):
                        where = (real != shadow).flatten(1).any(1).nonzero().flatten() + 1
                        raise ShadowMismatch(f"{what}: layer {layer}, {half} {buffer} differ at {where.tolist()}")

    def _see(self, layer, plan, q, k, v, scaling):
        out = self._attend(layer, plan, q, k, v, scaling)
        calls = self._calls if Tape.recording is None else Tape.recording.notes
        calls[layer] = (q, k, v, scaling, out)
        return out


def _layer_format(layer):
    return LayerFormat(layer.key.format, layer.value.format, layer.key.sinks.shape[1])
