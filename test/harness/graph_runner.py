"""Upstream's graph runners and backends on a CPU, with tapes in the place of CUDA graphs."""

import torch

from harness.graph_tape import Tape, TapeEvent, graph
from sglang.srt.distributed import parallel_state
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
from sglang.srt.model_executor.runner import decode_cuda_graph_runner


def install(fence):
    """Let this process capture, for good. ``fence`` is called in every replay at the event that lets the scheduler go on to
    write the request table."""
    torch.cuda.CUDAGraph = Tape
    torch.cpu.graph = graph
    torch.cpu.graph_pool_handle = lambda: (0, 0)
    torch.cpu.is_current_stream_capturing = lambda: Tape.recording is not None
    parallel_state.get_current_device_stream_fast = torch.cpu.current_stream
    decode_cuda_graph_runner.make_external_event = lambda device_module: TapeEvent(fence)
    # Upstream's own asks for torch.compile on a CPU.
    cuda_graph_setup.capture_decode_graph = _capture_decode_graph


def _capture_decode_graph(*, model_runner):
    off = check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED)
    return cuda_graph_setup.GraphCapture(
        runner=None if off else model_runner._decode_cuda_graph_runner_cls()(model_runner),
        memory_phase="decode",
        memory_usage_gb=0,
        capture_time=0,
    )
