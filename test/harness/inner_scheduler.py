"""Upstream's scheduler in this process, with a client in the place of its sockets."""

from sglang.srt.managers import scheduler as upstream
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
from sglang.srt.server_args import PortArgs, prepare_server_args


class InnerScheduler(upstream.Scheduler):
    """The scheduler as it is. ``client`` has upstream's ``recv_requests`` and ``send_output``; ``over`` ends the event loop."""

    def __init__(self, server_args, port_args, client):
        self.client = client
        super().__init__(server_args, port_args)

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


def make_scheduler(scheduler_class, checkpoint, flags, *others):
    """A scheduler of a server with ``flags``; a process can make one. ``others`` are the rest of its arguments."""
    args = prepare_server_args(["--model-path", str(checkpoint), *flags])
    ranks = SpawnRanks(world_rank=spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0)
    publish(args, role="scheduler", ranks=ranks)
    return scheduler_class(args, PortArgs.init_new(args), *others)
