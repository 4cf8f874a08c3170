"""Upstream's scheduler over a checked cache, with clients in the place of sockets."""

import random
from collections import Counter

from harness.inner_scheduler import InnerScheduler, make_scheduler
from harness.soak_checker import CheckingKernels
from harness.soak_client import Client
from harness.soak_model import CONTEXT, TokenFunction
from sglang.srt.managers import scheduler as upstream


class SoakScheduler(InnerScheduler):
    """The scheduler as it is; it tells the checker what a batch consists of, and counts what happens to requests."""

    def __init__(self, server_args, port_args, scenario):
        self.events = Counter()
        self._scenario = scenario
        self._running = set()
        client = Client(random.Random(scenario.seed), scenario, self._progress, self._ended)
        super().__init__(server_args, port_args, client)
        runner = self.tp_worker.model_runner
        attention = runner.attn_backend
        self.checker = CheckingKernels(attention._kernels, TokenFunction(runner.model), CONTEXT)
        attention._kernels = self.checker
        self._prepare, attention.init_forward_metadata = attention.init_forward_metadata, self._see

    def run_batch(self, batch, *args, **kwargs):
        mode, events = batch.forward_mode, self.events
        events["mixed batch"] += mode.is_mixed()
        events["decode batch"] += mode.is_decode()
        events["chunked prefill"] += self.chunked_req in batch.reqs
        for req in batch.reqs:
            if req.rid not in self._running:
                self._running.add(req.rid)
                events["prefix hit"] += req.prefix_len > 0
                events["slot"] += 1
        self.checker.begin([(req.rid, [*req.origin_input_ids, *req.output_ids]) for req in batch.reqs])
        return super().run_batch(batch, *args, **kwargs)

    def _add_request_to_queue(self, req, is_retracted=False):
        if is_retracted or req.rid in self._running:
            self.events["retraction" if is_retracted else "preemption"] += 1
        self._running.discard(req.rid)
        self.checker.release(req.rid)
        super()._add_request_to_queue(req, is_retracted)

    def _see(self, forward_batch):
        # With overlapped scheduling the scheduler learns a step's token after the next step has begun.
        self.checker.see(forward_batch.input_ids)
        self._prepare(forward_batch)

    def _progress(self):
        return self.checker.compared.total() / self._scenario.tokens

    def _ended(self, rid):
        self._running.discard(rid)
        self.checker.forget(rid)


def soak(scenario, checkpoint):
    """Run a scenario (soak.Scenario) to its end in this process, which can do so once.

    Returns the compared tokens by the place they were read from, the events by name, and the name of the kernels. Raises
    SoakMismatch.
    """
    upstream.TEST_RETRACT = scenario.test_retract
    scheduler = make_scheduler(SoakScheduler, checkpoint, scenario.flags, scenario)
    scheduler.run_event_loop()
    return scheduler.checker.compared, scheduler.events + scheduler.client.events, scheduler.checker.name
