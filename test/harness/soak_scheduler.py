"""Upstream's scheduler over a checked cache, with clients in the place of sockets."""

import random
from collections import Counter

from harness.soak_checker import CheckingKernels
from harness.soak_client import Client
from harness.soak_model import CONTEXT, TokenFunction
from sglang.srt.managers import scheduler as upstream
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
from sglang.srt.server_args import PortArgs, prepare_server_args


class SoakScheduler(upstream.Scheduler):
    """The scheduler as it is; it tells the checker what a batch consists of, and counts what happens to requests."""

    def __init__(self, server_args, port_args, scenario):
        self.events = Counter()
        self._scenario = scenario
        self._running = set()
        self.client = Client(random.Random(scenario.seed), scenario, self._progress, self._ended)
        super().__init__(server_args, port_args)
        runner = self.tp_worker.model_runner
        attention = runner.attn_backend
        self.checker = CheckingKernels(attention._kernels, TokenFunction(runner.model), CONTEXT)
        attention._kernels = self.checker
        self._prepare, attention.init_forward_metadata = attention.init_forward_metadata, self._see

    def init_ipc_channels(self, port_args):
        self.ipc_channels = SchedulerIpcChannels(
            recv_from_tokenizer=None,
            recv_from_rpc=None,
            send_to_tokenizer=self.client,
            send_to_detokenizer=self.client,
            send_metrics_from_scheduler=None,
        )
        self.load_snapshot_writer = self.recv_from_tokenizer = None

    def init_request_receiver(self):
        self.request_receiver = self.client

    def ingest_requests(self, *args, **kwargs):
        received = super().ingest_requests(*args, **kwargs)
        self.gracefully_exit = self.client.over
        return received

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
    args = prepare_server_args(["--model-path", str(checkpoint), *scenario.flags])
    upstream.TEST_RETRACT = scenario.test_retract
    ranks = SpawnRanks(world_rank=spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0)
    publish(args, role="scheduler", ranks=ranks)
    scheduler = SoakScheduler(args, PortArgs.init_new(args), scenario)
    scheduler.run_event_loop()
    return scheduler.checker.compared, scheduler.events + scheduler.client.events, scheduler.checker.name
