"""The attention backend that upstream calls: what a batch is, for the kernels of the device (dispatch.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.kvtuner.attention.base import Workload
from sglang.srt.kvtuner.attention.dispatch import make_kernels
from sglang.srt.kvtuner.attention.steps import StepPlan
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.config.agreement import require_success
from sglang.srt.kvtuner.config.compatibility import refuse_unsupported_layers
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class KVTunerAttnBackend(AttentionBackend):
    """One path for prefill, chunked prefill, mixed batches and decode: each request of a batch adds one or more tokens to
    those before (steps.py).

    In CUDA graphs of decode steps the plan is the first launch: a graph that is replayed plans its step itself, from upstream's
    static inputs. Layers read the plan and those inputs alone, never the request table, which upstream may write for the next
    batch as soon as the plan is made. Padded rows are requests of one token in slot 0, whose ring and page 0 belong to nobody.
    Graphs of prefills break at attention, which plans and runs as without them.
    """

    # Upstream's dummy batches then have no more requests than the cache has slots, which is what plans have room for.
    extend_dummy_seqs_capped_by_req_pool = True

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        self.pool: KVTunerTokenToKVPool = model_runner.token_to_kv_pool
        layers = [m for m in model_runner.model.modules() if isinstance(m, RadixAttention)]
        refuse_unsupported_layers(layers)
        storage, requests = self.pool.storage, model_runner.req_to_token_pool
        workload = Workload.over(
            storage,
            heads=max(layer.tp_q_head_num for layer in layers),
            most_pages=requests.req_to_token.shape[1] // storage.page_size,
            workspace_tokens=self.pool.workspace_tokens,
        )
        self._kernels = make_kernels(storage, self.pool.layer_formats, workload)
        self._planner = self._kernels.planner_class(
            page_size=storage.page_size,
            residual_length=storage.residual_length,
            req_to_token=requests.req_to_token,
            req_generation=requests.req_generation,
        )
        # Every rank comes here straight from the pool; none goes on to the capture of graphs, which waits in collectives, before
        # all have their kernels.
        require_success(lambda: self._kernels.compile(self._planner, workload))
        self.pool.attention = self._kernels.name
        self.pool.kernel_bytes = {use.name: use.bytes(storage.num_slots) for use in self._kernels.memory(workload)}
        # Upstream copies the lengths of a decode batch to the host for who asks, which waits for the device.
        self.needs_cpu_seq_lens = not self._kernels.graph_safe
        self._plan: Any = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the batch once; all layers share the plan."""
        self._plan = self._kernels.plan(self._step(forward_batch))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make room for decode graphs of up to ``max_bs`` rows. Raises RuntimeError where the kernels cannot be captured."""
        if not self._kernels.graph_safe:
            raise RuntimeError(
                f"CUDA graphs cannot capture the {self._kernels.name}, which serves the quantized KV cache here (the log says "
                "why); start with --cuda-graph-backend-decode disabled"
            )
        self._planner.allocate(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """A padded row has its own token and nothing before it."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Nothing: a decode step costs the host no more than its replay."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Plan a decode step from upstream's static inputs; captured with the layers."""
        self.init_forward_metadata(forward_batch)

    def _step(self, batch: ForwardBatch) -> StepPlan:
        mode = batch.forward_mode
        if mode.is_idle():
            return self._planner.plan((), (), ())
        if mode.is_decode():
            known = batch.seq_lens_cpu if self.needs_cpu_seq_lens else None
            most_tokens = int(known.max()) if known is not None else None
            return self._planner.plan_decode(batch.req_pool_indices, batch.seq_lens, most_tokens)
        if mode.is_extend():
            slots = batch.req_pool_indices_cpu
            slots = (batch.req_pool_indices if slots is None else slots).tolist()
            return self._planner.plan(slots, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)
        raise NotImplementedError(f"the quantized KV cache does not support {mode.name} batches")

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        """q [tokens, heads * head_dim] (or split by heads), k and v [tokens, kv_heads, head_dim]; returns the shape of q,
        two-dimensional."""
        if k is None or v is None or not save_kv_cache or any(value is not None for value in kwargs.values()):
            raise NotImplementedError(
                f"layer {layer.layer_id} shares another layer's cache or passes {sorted(kwargs)}, which the quantized "
                "KV cache does not support"
            )
        index = layer.layer_id - self.pool.start_layer
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)
        out = self._kernels.attend(index, self._plan, q, k, v, layer.scaling)
        self._kernels.store(index, self._plan, k, v)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    # One token per request is a step like any other.
    forward_decode = forward_extend
