"""Attention over the packed cache against loops in double precision."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.cache import RequestTable, mixed_format
from harness.cache_model import naive_attention
from sglang.srt.kvtuner.attention.backend import KVTunerAttnBackend
from sglang.srt.kvtuner.attention.base import Kernels, KernelsUnavailable
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.kvtuner.format.page_codec import pack_pages, unpack_pages
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

HEAD_DIM, LAYERS = 16, 3


class Server:
    """A backend with the parts of a model runner that it reads, and every token in full precision beside it."""

    def __init__(self, residual, heads=6, kv_heads=2, page_size=16, dtype=torch.float32):
        self.format = mixed_format(page_size, residual, LAYERS, HEAD_DIM)
        self.heads, self.kv_heads, self.dtype = heads, kv_heads, dtype
        self.table = RequestTable(page_size)
        pool = KVTunerTokenToKVPool(
            self.format, size=63 * page_size, num_slots=4, kv_heads=kv_heads, full_precision_dtype=dtype, device="cpu",
            start_layer=0, end_layer=LAYERS,
        )  # fmt: skip
        self.layers = [RadixAttention(heads, HEAD_DIM, HEAD_DIM**-0.5, kv_heads, layer_id=i) for i in range(LAYERS)]
        self.backend = KVTunerAttnBackend(
            SimpleNamespace(token_to_kv_pool=pool, model=nn.ModuleList(self.layers), req_to_token_pool=self.table)
        )
        self.keys = {slot: torch.empty(LAYERS, 0, kv_heads, HEAD_DIM) for slot in (1, 2, 3)}
        self.values = {slot: torch.empty(LAYERS, 0, kv_heads, HEAD_DIM) for slot in (1, 2, 3)}
        for slot in self.keys:
            self.table.begin(slot)

    def length(self, slot):
        return self.keys[slot].shape[1]

    def batch(self, mode, slots, news):
        """A forward batch as the backend sees it; decode carries no extend lengths and no host copy of the slots."""
        priors = [self.length(slot) for slot in slots]
        lengths = torch.tensor([prior + new for prior, new in zip(priors, news)], dtype=torch.int64)
        indices = torch.tensor(slots, dtype=torch.int64)
        extend = mode != ForwardMode.DECODE
        return SimpleNamespace(
            forward_mode=mode,
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            req_pool_indices=indices,
            req_pool_indices_cpu=indices if extend else None,
            extend_prefix_lens_cpu=priors if extend else None,
            extend_seq_lens_cpu=list(news) if extend else None,
        )

    def forward(self, mode, slots, news, tolerance=1e-5):
        """One forward pass of all layers, each compared with the naive result over what the cache may know."""
        batch = self.batch(mode, slots, news)
        for slot, new in zip(slots, news):
            self.table.extend(slot, self.length(slot) + new)
        self.backend.init_forward_metadata(batch)
        rows = sum(news)
        fresh_k, fresh_v = torch.randn(2, LAYERS, rows, self.kv_heads, HEAD_DIM).to(self.dtype).unbind()
        for layer in self.layers:
            q = torch.randn(rows, self.heads * HEAD_DIM).to(self.dtype)
            i, k, v = layer.layer_id, fresh_k[layer.layer_id], fresh_v[layer.layer_id]
            out = self.backend.forward(q, k, v, layer, batch)
            assert out.shape == q.shape and out.dtype == self.dtype
            split_q, split_out, row = q.view(rows, self.heads, HEAD_DIM), out.view(rows, self.heads, HEAD_DIM), 0
            for slot, new in zip(slots, news):
                part = slice(row, row + new)
                k_seen = torch.cat([self.known(self.keys[slot][i], self.format.layers[i].key), k[part].float()])
                v_seen = torch.cat([self.known(self.values[slot][i], self.format.layers[i].value), v[part].float()])
                expected = naive_attention(split_q[part], k_seen, v_seen, layer.scaling)
                torch.testing.assert_close(split_out[part].double(), expected, rtol=tolerance, atol=tolerance)
                row += new
        row = 0
        for slot, new in zip(slots, news):
            self.keys[slot] = torch.cat([self.keys[slot], fresh_k[:, row : row + new].float()], dim=1)
            self.values[slot] = torch.cat([self.values[slot], fresh_v[:, row : row + new].float()], dim=1)
            row += new

    def known(self, tokens, fmt):
        """Earlier tokens as a step sees them: whole pages outside the window went through the codec."""
        seen, page = tokens.clone(), self.format.page_size
        for first in range(0, (len(tokens) - self.format.residual_length) // page * page, page):
            block = pack_pages(tokens[first : first + page].transpose(0, 1), fmt)
            seen[first : first + page] = unpack_pages(block, fmt).transpose(0, 1)
        return seen


@pytest.mark.parametrize("residual", (0, 16, 25, 1000))
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (8, 1)])
def test_extend_then_decode(residual, heads, kv_heads):
    torch.manual_seed(residual)
    server = Server(residual, heads, kv_heads)
    server.forward(ForwardMode.EXTEND, (1, 2), (20, 3))
    server.forward(ForwardMode.EXTEND, (1,), (29,))  # the next chunk of a chunked prefill
    for _ in range(7):
        server.forward(ForwardMode.DECODE, (2, 1), (1, 1))


def test_mixed_batches():
    torch.manual_seed(0)
    server = Server(residual=16)
    server.forward(ForwardMode.EXTEND, (1, 2), (33, 18))
    server.forward(ForwardMode.MIXED, (3, 1, 2), (50, 1, 1))
    server.forward(ForwardMode.DECODE, (1, 2, 3), (1, 1, 1))


def test_half_precision_model():
    torch.manual_seed(0)
    server = Server(residual=16, dtype=torch.bfloat16)
    server.forward(ForwardMode.EXTEND, (1,), (50,), tolerance=2**-7)
    server.forward(ForwardMode.DECODE, (1,), (1,), tolerance=2**-7)


def test_full_precision_where_the_window_holds_everything():
    """With a window longer than the request, attention is exact whatever the bits."""
    torch.manual_seed(0)
    server = Server(residual=10_000)
    for chunk in (30, 30, 1):
        server.forward(ForwardMode.EXTEND, (1,), (chunk,), tolerance=1e-6)


def test_idle_batches_touch_nothing():
    server = Server(residual=16)
    before = [half.pages.clone() for half in server.backend.pool.storage.keys]
    batch = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    server.backend.init_forward_metadata(batch)
    out = server.backend.forward(torch.empty(0, 6 * HEAD_DIM), None, None, server.layers[0], batch)
    assert out.shape == (0, 6 * HEAD_DIM)
    assert all(torch.equal(a, b.pages) for a, b in zip(before, server.backend.pool.storage.keys))


def test_modes_that_are_not_supported_are_refused():
    server = Server(residual=16)
    batch = server.batch(ForwardMode.DRAFT_EXTEND_V2, (1,), (1,))
    with pytest.raises(NotImplementedError, match="DRAFT_EXTEND_V2"):
        server.backend.init_forward_metadata(batch)


@pytest.mark.parametrize("change", [{"k": None}, {"v": None}, {"save_kv_cache": False}, {"q_rope": torch.zeros(1)}])
def test_attention_variants_are_refused_rather_than_ignored(change):
    server = Server(residual=16)
    batch = server.batch(ForwardMode.DECODE, (1,), (1,))
    server.table.extend(1, 1)
    server.backend.init_forward_metadata(batch)
    q, kv = torch.zeros(1, 6 * HEAD_DIM), torch.zeros(1, 2, HEAD_DIM)
    arguments = {"q": q, "k": kv, "v": kv, "layer": server.layers[2], "forward_batch": batch, **change}
    with pytest.raises(NotImplementedError, match="layer 2 .*q_rope" if "q_rope" in change else "layer 2 "):
        server.backend.forward_decode(**arguments)
    server.backend.forward_decode(**{**arguments, "k": kv, "v": kv, "save_kv_cache": True, "q_rope": None})


def test_kernels_are_compiled_before_the_backend_is_there(monkeypatch):
    asked = []
    monkeypatch.setattr(Kernels, "compile", lambda *arguments: asked.append(arguments))
    backend = Server(16, heads=6).backend
    ((kernels, planner, workload),) = asked
    assert (kernels, planner, workload.heads) == (backend._kernels, backend._planner, 6)

    def fail(*arguments):
        raise KernelsUnavailable("no compiler")

    monkeypatch.setattr(Kernels, "compile", fail)
    with pytest.raises(KernelsUnavailable, match="no compiler"):
        Server(16)


def test_layers_with_a_variant_are_refused_when_the_model_is_loaded():
    layer = RadixAttention(6, HEAD_DIM, math.sqrt(1 / HEAD_DIM), 2, layer_id=7, sliding_window_size=128)
    runner = SimpleNamespace(
        token_to_kv_pool=Server(16).backend.pool, model=nn.ModuleList([layer]), req_to_token_pool=None
    )
    with pytest.raises(KVTunerConfigError, match="layer 7 has a sliding window of 128"):
        KVTunerAttnBackend(runner)
