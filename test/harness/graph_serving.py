"""Scripted requests through upstream's scheduler and its graph runners, on a CPU, with every step compared with the reference."""

import torch

from harness import graph_runner
from harness.graph_client import ScriptClient
from harness.graph_shadow import ShadowCache
from harness.graph_tape import Tape
from harness.graphs import VOCAB, Served
from harness.inner_scheduler import InnerScheduler, make_scheduler
from sglang.srt.kvtuner.attention import backend as attention


class GraphScheduler(InnerScheduler):
    """The scheduler as it is; follows every forward with a shadow, and writes nonsense to the request table as early as upstream
    may: as soon as a replay has passed its event, and put back when the replay is over."""

    def __init__(self, server_args, port_args, script, shadowed):
        self.served = Served()
        self._owners, self._saved, self._shadow = {}, None, None
        if shadowed:
            graph_runner.install(self._scribble)
            self._shadow_backends()
        super().__init__(server_args, port_args, ScriptClient(script, VOCAB))
        runner = self.tp_worker.model_runner
        self._runner, self._table = runner, runner.req_to_token_pool
        self._page = runner.token_to_kv_pool.page_size
        self._forward, runner.forward = runner.forward, self._follow
        self.served.kernels = runner.attn_backend._kernels.name

    def _shadow_backends(self):
        """Captures begin as soon as the backend is there."""
        init = attention.KVTunerAttnBackend.__init__

        def shadowed(backend, model_runner):
            init(backend, model_runner)
            self._shadow = ShadowCache(backend._kernels, model_runner.req_to_token_pool)

        attention.KVTunerAttnBackend.__init__ = shadowed

    def run_batch(self, batch, *args, **kwargs):
        events, mode = self.served.events, batch.forward_mode
        events["chunked prefill"] += self.chunked_req in batch.reqs
        for req in batch.reqs:
            if mode.is_extend() and req.prefix_len and not req.output_ids and req.rid not in self._owners:
                events[f"prefix hit of {req.prefix_len // self._page} pages"] += 1
        return super().run_batch(batch, *args, **kwargs)

    def process_batch_result(self, batch, result):
        if batch.forward_mode.is_decode():
            self.served.events["step of a request that was over"] += sum(req.finished() for req in batch.reqs)
        super().process_batch_result(batch, result)

    def _apply_war_barrier(self):
        self.served.events["fence within a replay"] += self._runner.shared_read_done_event is not None
        super()._apply_war_barrier()

    def _scribble(self):
        table = self._table.req_to_token
        self._saved = table.clone()
        table.copy_((table + self._page * 3) % (self._runner.token_to_kv_pool.size // self._page * self._page))

    def _follow(self, batch, *args, **kwargs):
        out = self._forward(batch, *args, **kwargs)
        if self._saved is not None:
            self._table.req_to_token.copy_(self._saved)
            self._saved = None
        self._count(batch, Tape.replayed)
        starts = self._runner.attn_backend._planner.rings.start
        for rid, slot in zip(batch.rids, batch.req_pool_indices.tolist(), strict=True):
            self.served.ring_starts[rid] = starts[slot].item()
        if self._shadow is not None:
            self._shadow.check(batch)
        return out

    def _count(self, batch, tape):
        events = self.served.events
        for rid, slot in zip(batch.rids, batch.req_pool_indices.tolist(), strict=True):
            events["slot that changed hands"] += rid not in self._owners and slot in self._owners.values()
            self._owners[rid] = slot
        if tape is None:
            return
        if not batch.forward_mode.is_decode():
            events["replay of a prefill"] += 1
            return
        events["replay"] += 1
        rows = self._runner.decode_cuda_graph_runner.bs
        self.served.launches[rows] = tape.launches
        events["padded replay"] += batch.batch_size < rows
        completed = (batch.seq_lens % self._page == 0).sum().item()
        events["page completed in a replay"] += completed


def serve(script, checkpoint, flags, shadowed):
    """Serve a script to its end in this process, which can do so once. Returns Served. Raises ShadowMismatch.

    shadowed: with tapes and a shadow; else it is a server without graphs.
    """
    torch.set_num_threads(1)
    scheduler = make_scheduler(GraphScheduler, checkpoint, flags, script, shadowed)
    scheduler.run_event_loop()
    served = scheduler.served
    served.tokens = {name: tuple(tokens) for name, tokens in scheduler.client.tokens.items()}
    served.events = +served.events
    return served
