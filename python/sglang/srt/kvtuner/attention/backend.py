"""Attention over the packed cache: by the device's kernels (dispatch.py), or in plain torch.

The torch code serves CPU and CUDA, and is the reference that every kernel is tested against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang.srt.kvtuner.attention.dispatch import REFERENCE, choose_kernels
from sglang.srt.kvtuner.attention.steps import BatchPlan, SequenceStep, StepPlanner
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.config.compatibility import refuse_unsupported_layers
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

# Attention weights computed at once: 256 MiB of float32.
MAX_WEIGHTS = 1 << 26


class KVTunerAttnBackend(AttentionBackend):
    """Computes in float32 from dequantized pages, the residual window and the step's own keys and values.

    One code path serves prefill, chunked prefill, mixed batches and decode: each request of a batch adds one or more
    tokens to those before (see steps.py).
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        self.pool: KVTunerTokenToKVPool = model_runner.token_to_kv_pool
        refuse_unsupported_layers(m for m in model_runner.model.modules() if isinstance(m, RadixAttention))
        self._planner = StepPlanner(self.pool.format, self.pool.window, model_runner.req_to_token_pool)
        self._kernels = choose_kernels(self.pool.device, self.pool.formats)
        self.pool.attention = self._kernels.name if self._kernels else REFERENCE
        self._steps: list[SequenceStep] | BatchPlan = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the batch once; all layers share the plan."""
        if forward_batch.forward_mode.is_idle():
            self._steps = []
        elif forward_batch.forward_mode.is_decode():
            priors = [length - 1 for length in _host(forward_batch.seq_lens_cpu, forward_batch.seq_lens)]
            self._steps = self._plan(_host(None, forward_batch.req_pool_indices), priors, [1] * len(priors))
        elif forward_batch.forward_mode.is_extend():
            self._steps = self._plan(
                _host(forward_batch.req_pool_indices_cpu, forward_batch.req_pool_indices),
                list(forward_batch.extend_prefix_lens_cpu),
                list(forward_batch.extend_seq_lens_cpu),
            )
        else:
            raise NotImplementedError(
                f"the quantized KV cache does not support {forward_batch.forward_mode.name} batches"
            )

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        """q [tokens, heads * head_dim] (or split by heads), k and v [tokens, kv_heads, head_dim]; returns the shape of q,
        two-dimensional."""
        return self._forward(q, k, v, layer, save_kv_cache, kwargs)

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        """As :meth:`forward_extend`, with one token per request."""
        return self._forward(q, k, v, layer, save_kv_cache, kwargs)

    def support_triton(self) -> bool:
        return False

    def _plan(self, slots: list[int], priors: list[int], news: list[int]) -> list[SequenceStep] | BatchPlan:
        plan = self._planner.plan_flat if self._kernels else self._planner.plan_batch
        return plan(slots, priors, news)

    def _forward(self, q, k, v, layer: RadixAttention, save_kv_cache: bool, extra: dict) -> torch.Tensor:
        if k is None or v is None or not save_kv_cache or any(value is not None for value in extra.values()):
            raise NotImplementedError(
                f"layer {layer.layer_id} shares another layer's cache or passes {sorted(extra)}, which the quantized "
                "KV cache does not support"
            )
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)
        if self._kernels is not None and self._steps:
            out = self._kernels.forward(self.pool, layer.layer_id, self._steps, q, k, v, layer.scaling)
            return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)
        out = torch.empty_like(q)
        for step in self._steps:
            k_new, v_new = k[step.tokens], v[step.tokens]
            k_prior, v_prior = self.pool.read_prior(layer.layer_id, step)
            self.pool.store(layer.layer_id, step, k_new, v_new)
            out[step.tokens] = attend(
                q[step.tokens],
                torch.cat([k_prior, k_new.float()]),
                torch.cat([v_prior, v_new.float()]),
                scaling=layer.scaling,
            )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """Causal grouped-query attention of one request's newest tokens, in float32.

    q: [new, heads, head_dim]. k, v: float32 [tokens, kv_heads, head_dim]; the last ``new`` of them are the queries' own.
    Returns float32 [new, heads, head_dim].
    """
    new, heads = q.shape[:2]
    prior = k.shape[0] - new
    # A long chunk over a long prefix goes in blocks, since the weights are [heads, new, tokens].
    block = max(MAX_WEIGHTS // (heads * k.shape[0]), 1)
    return torch.cat([_attend_block(q, k, v, scaling, prior, i, min(i + block, new)) for i in range(0, new, block)])


def _attend_block(q, k, v, scaling: float, prior: int, start: int, end: int) -> torch.Tensor:
    seen = prior + end
    mask = None
    if end - start > 1:
        mask = torch.ones(end - start, seen, dtype=torch.bool, device=q.device).tril_(prior + start)
    out = scaled_dot_product_attention(
        q[start:end].float().transpose(0, 1).unsqueeze(0),
        k[:seen].transpose(0, 1).unsqueeze(0),
        v[:seen].transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


def _host(mirror: torch.Tensor | None, tensor: torch.Tensor) -> list[int]:
    """Values of ``tensor`` as a list, from its host mirror where upstream keeps one."""
    return (tensor if mirror is None else mirror).tolist()
