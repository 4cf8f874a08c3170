"""Attention backends of which host_work.py times a decode step: the quantized cache's and upstream's Triton backend.

Each is built as for a model on a GPU, over a cache of a few pages on the CPU, with a stand-in for upstream's model runner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import LlamaConfig

from sglang.kernels.ops.kvcache import kvcache as upstream_store
from sglang.srt.kvtuner.attention import dispatch
from sglang.srt.kvtuner.attention import triton as kvtuner_triton
from sglang.srt.kvtuner.attention.backend import KVTunerAttnBackend
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_context, get_parallel

# Small, so that rings of all layers fit any machine; the host does the same whatever the page.
PAGE = 16
POOL_TOKENS = 2 * PAGE
MULTIPROCESSORS = 132
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A model's attention and a decode batch; context: most tokens of a request, which all requests of the batch nearly have."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int


class DecodeStep:
    """A backend's decode step of a batch: what :meth:`metadata` and :meth:`layers` call is what upstream's model runner calls."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.requests = memory_pool.ReqToTokenPool(shape.batch, shape.context, "cpu", False)
        self.modules = nn.ModuleList(
            RadixAttention(shape.heads, shape.head_dim, shape.head_dim**-0.5, shape.kv_heads, layer_id=layer)
            for layer in range(shape.layers)
        )
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=shape.batch,
            req_pool_indices=torch.arange(1, shape.batch + 1),
            seq_lens=torch.full((shape.batch,), shape.context - 1),
            # Neither backend asks for the lengths on the host.
            seq_lens_cpu=None,
            seq_lens_sum=None,
            out_cache_loc=torch.zeros(shape.batch, dtype=torch.int64),
            out_cache_loc_is_physical=True,
            kv_loc_plan=None,
            spec_info=None,
        )
        # Views of one projection's output, as models hand them over.
        widths = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        q, k, v = torch.zeros(shape.batch, sum(widths), dtype=DTYPE).split(widths, dim=-1)
        self.qkv = q, *(x.view(-1, shape.kv_heads, shape.head_dim) for x in (k, v))
        self.attention: Any = None

    def metadata(self) -> None:
        self.attention.init_forward_metadata(self.batch)

    def layers(self) -> None:
        for module in self.modules:
            self.attention.forward_decode(*self.qkv, module, self.batch)

    def eager(self) -> None:
        """A step without CUDA graphs."""
        self.metadata()
        self.layers()

    def replay(self) -> None:
        """What the backend does before a captured step is replayed."""
        self.attention.init_forward_metadata_out_graph(self.batch)


@contextlib.contextmanager
def kvtuner(shape: Shape) -> Iterator[DecodeStep]:
    """The quantized cache's backend with its Triton kernels: 4 bits, asymmetric, keys per channel."""
    step = DecodeStep(shape)
    key = TensorFormat(4, True, 1, PAGE, PAGE, shape.head_dim, True)
    value = TensorFormat(4, True, 0, shape.head_dim, PAGE, shape.head_dim, False)
    cache_format = CacheFormat((LayerFormat(key, value),) * shape.layers, page_size=PAGE, residual_length=0)
    pool = KVTunerTokenToKVPool(
        cache_format, size=POOL_TOKENS, num_slots=shape.batch + 1, kv_heads=shape.kv_heads, full_precision_dtype=DTYPE,
        device="cpu", start_layer=0, end_layer=shape.layers,
    )  # fmt: skip
    runner = SimpleNamespace(token_to_kv_pool=pool, model=step.modules, req_to_token_pool=step.requests)
    with (
        patch.object(dispatch, "choose_kernels", lambda *_: (kvtuner_triton.TritonKernels, [])),
        patch.object(kvtuner_triton.TritonKernels, "compile", lambda *_: None),  # trial steps, which launch
        patch.object(kvtuner_triton, "_multiprocessors", lambda _: MULTIPROCESSORS),
    ):
        step.attention = KVTunerAttnBackend(runner)
        step.attention.init_cuda_graph_state(shape.batch, shape.batch)
        yield step


@contextlib.contextmanager
def upstream(shape: Shape, stored: list[str]) -> Iterator[DecodeStep]:
    """Upstream's Triton backend over its own pool. The C++ kernel that stores keys and values does nothing but append its
    name to ``stored``; what is around it runs."""
    step = DecodeStep(shape)
    store = SimpleNamespace(store_cache=lambda *_: stored.append("store_cache"))
    published = get_context().override_server_args(device="cpu", attention_backend="triton")
    with contextlib.ExitStack() as stack:
        published.install()
        stack.callback(published.restore)
        stack.enter_context(get_parallel().override(attn_dcp_rank=0))
        pool = memory_pool.MHATokenToKVPool(
            size=POOL_TOKENS, page_size=PAGE, dtype=DTYPE, head_num=shape.kv_heads, head_dim=shape.head_dim,
            layer_num=shape.layers, device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        step.attention = TritonAttnBackend(_upstream_runner(shape, step.requests, pool))
        step.attention.device_core_count = MULTIPROCESSORS
        step.attention.init_cuda_graph_state(shape.batch, shape.batch)
        # The way that the pool takes on GPUs, without the check of the tensors' device.
        stack.enter_context(patch.object(memory_pool, "_is_cuda", True))
        stack.enter_context(patch.object(memory_pool, "can_use_store_cache", lambda *_: True))
        stack.enter_context(patch.object(memory_pool, "store_cache", upstream_store.store_cache.__wrapped__))
        stack.enter_context(patch.object(upstream_store, "_jit_kvcache_module", lambda *_: store))
        yield step


def _upstream_runner(shape: Shape, requests: Any, pool: Any) -> SimpleNamespace:
    """What upstream's backend reads of a model runner."""
    translator = KVIndexTranslator(
        req_to_token=requests.req_to_token, token_to_kv_pool_allocator=None, token_to_kv_pool=pool, page_size=PAGE,
        device="cpu",
    )  # fmt: skip
    model = SimpleNamespace(
        hf_config=LlamaConfig(architectures=["LlamaForCausalLM"]),
        attention_arch=None,
        linear_attn_registry_result=None,
        is_encoder_decoder=False,
        context_len=shape.context,
        head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        swa_v_head_dim=shape.head_dim,
        qk_nope_head_dim=0,
        qk_rope_head_dim=0,
        kv_lora_rank=0,
        get_max_num_attention_heads=lambda: shape.heads,
        get_num_kv_heads=lambda *_: shape.kv_heads,
    )
    return SimpleNamespace(
        model_config=model,
        req_to_token_pool=requests,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=None,
        kv_index_translator=translator,
        page_size=PAGE,
        kv_cache_dtype=DTYPE,
        device="cpu",
        gpu_id=0,
        sliding_window_size=None,
        is_draft_worker=False,
        spec_algorithm=None,
        decode_num_tokens_per_req=lambda: 1,
    )
