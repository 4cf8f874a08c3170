"""Faults to plant in the product, for tests of its graphs: each is called in the process that serves, before the cache is made."""

from types import SimpleNamespace

import torch

from sglang.srt.kvtuner.attention.backend import KVTunerAttnBackend
from sglang.srt.kvtuner.attention.triton_planner import TritonPlanner


def ring_start_left_out():
    """Plans of decode steps take every ring to begin with its request."""
    original = TritonPlanner.plan_decode

    def plan_decode(self, *args, **kwargs):
        rings, self.rings = self.rings, SimpleNamespace(start=torch.zeros_like(self.rings.start))
        try:
            return original(self, *args, **kwargs)
        finally:
            self.rings = rings

    TritonPlanner.plan_decode = plan_decode


def page_ids_read_late():
    """Every layer of a decode step reads page ids from the request table, when it runs."""
    original = KVTunerAttnBackend.forward_extend

    def forward(self, q, k, v, layer, forward_batch, *args, **kwargs):
        if forward_batch.forward_mode.is_decode():
            self.init_forward_metadata_in_graph(forward_batch)
        return original(self, q, k, v, layer, forward_batch, *args, **kwargs)

    KVTunerAttnBackend.forward_extend = KVTunerAttnBackend.forward_decode = forward


def padded_rows_write_a_live_ring():
    """Padded rows of a decode step belong to slot 3, the first that upstream gives away."""
    original = TritonPlanner.plan_decode

    def plan_decode(self, slots, *args, **kwargs):
        return original(self, slots.masked_fill(slots == 0, 3), *args, **kwargs)

    TritonPlanner.plan_decode = plan_decode


def host_read_in_a_step():
    """The plan of a decode step asks for the longest of its requests."""
    original = KVTunerAttnBackend.init_forward_metadata_in_graph

    def init_forward_metadata_in_graph(self, forward_batch):
        int(forward_batch.seq_lens.max())
        original(self, forward_batch)

    KVTunerAttnBackend.init_forward_metadata_in_graph = init_forward_metadata_in_graph
