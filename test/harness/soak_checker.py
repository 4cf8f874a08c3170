"""Kernels that compare, before they attend, all that the cache would return with what its tokens' keys and values are."""

from collections import Counter

import torch
from torch.nn.functional import scaled_dot_product_attention

from harness.formats import ATTENTION_TOLERANCE
from sglang.srt.kvtuner.attention.base import Kernels
from sglang.srt.kvtuner.attention.prefix import prefix_parts
from sglang.srt.kvtuner.format.page_codec import pack_pages, unpack_pages

EVERYTHING = 1 << 30  # tokens


class SoakMismatch(AssertionError):
    """The cache returned other keys or values than were computed."""


class Transcript:
    """Tokens of a request, and what each reads as: in full precision, and from a packed page."""

    def __init__(self, rid, function, storage, capacity):
        self.rid = rid
        self._function, self._page = function, storage.page_size
        self._formats = [(layer.key.format, layer.value.format) for layer in storage.layers]
        shape = (len(self._formats), 2, capacity, storage.kv_heads, storage.head_dim)
        self._exact, self._packed = torch.empty(shape, dtype=storage.dtype), torch.empty(shape)
        self._tokens = []
        self.start = None  # tokens found in the prefix cache when the request last got a slot

    def extend(self, first, tokens):
        """The request's tokens from position ``first`` on are ``tokens``; raises SoakMismatch where known ones are others."""
        before, known = len(self._tokens), self._tokens[first : first + len(tokens)]
        if first > before or known != tokens[: len(known)]:
            raise SoakMismatch(
                f"request {self.rid}: tokens {first} to {first + len(tokens)} do not go on from the {before} before"
            )
        new = tokens[len(known) :]
        if not new:
            return
        self._tokens += new
        end = len(self._tokens)
        positions, new = torch.arange(before, end), torch.tensor(new)
        whole = slice(before // self._page * self._page, end // self._page * self._page)
        for layer, formats in enumerate(self._formats):
            for half, rows in enumerate(self._function.rows(layer, new, positions)):
                exact = self._exact[layer, half]
                exact[before:end] = rows
                if whole.start < whole.stop:
                    pages = exact[whole].unflatten(0, (-1, self._page)).transpose(1, 2)
                    read = unpack_pages(pack_pages(pages, formats[half]), formats[half])
                    self._packed[layer, half, whole] = read.transpose(1, 2).flatten(0, 1)

    def own(self, layer, half, rows):
        """What the model computes for the positions ``rows``."""
        return self._exact[layer, half, rows]

    def seen(self, layer, half, length, residual, sinks):
        """What a step with ``length`` tokens before it must read of them, float32: the rule of the residual window."""
        packed_end = max((length - residual) // self._page * self._page, self.start)
        seen = self._exact[layer, half, :length].to(torch.float32, copy=True)
        seen[sinks:packed_end] = self._packed[layer, half, sinks:packed_end]
        return seen


class CheckingKernels(Kernels):
    """The kernels ``inner``, with a check of every step: call :meth:`begin` and :meth:`see` before each.

    function: the model's, soak_model.TokenFunction. capacity: tokens of the longest request. compared: tokens before a step of
    which K and V were compared in all layers, summed over requests and steps, by the place that they were read from: "page",
    "ring", "sink" (in a layer at least).
    """

    def __init__(self, inner, function, capacity):
        super().__init__(inner.storage)
        self.name = inner.name
        self.compared = Counter()
        self._inner, self._function, self._capacity = inner, function, capacity
        self._transcripts = {}
        self._batch = self._input_ids = self._step = None

    @classmethod
    def supports(cls, layer):
        raise NotImplementedError("these kernels are put around others")

    @staticmethod
    def pack_pages(x, fmt):
        return pack_pages(x, fmt)

    def begin(self, requests):
        """Tell the next step's requests: (request id, the token ids that the scheduler knows of) in the batch's order."""
        self._batch = requests

    def see(self, input_ids):
        """Tell the tokens that the model gets in the next step."""
        self._input_ids = input_ids.tolist()

    def release(self, rid):
        """The request has given its slot back; it may get another."""
        if rid in self._transcripts:
            self._transcripts[rid].start = None

    def forget(self, rid):
        """The request is over."""
        self._transcripts.pop(rid, None)

    def plan(self, step):
        self._step = []
        for request, (rid, tokens) in zip(step.requests, self._batch, strict=True):
            if rid not in self._transcripts:
                self._transcripts[rid] = Transcript(rid, self._function, self.storage, self._capacity)
            transcript = self._transcripts[rid]
            transcript.extend(0, tokens[: request.end])
            transcript.extend(request.prefix_len, self._input_ids[request.queries])
            if transcript.start is None:
                transcript.start = request.prefix_len
            self._step.append((request, step.pages[request.row], transcript))
        return self._inner.plan(step)

    def attend(self, layer, plan, q, k, v, scaling):
        prefixes = []
        for request, page_ids, transcript in self._step:
            own = slice(request.prefix_len, request.end)
            for half, rows in enumerate((k, v)):
                if not torch.equal(rows[request.queries], transcript.own(layer, half, own)):
                    raise SoakMismatch(
                        f"request {transcript.rid}, layer {layer}: the model computed another {'KV'[half]} for {own}"
                    )
            prefixes.append(self._read(layer, request, page_ids, transcript))
        out = self._inner.attend(layer, plan, q, k, v, scaling)
        tolerance = ATTENTION_TOLERANCE + (0 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps)
        for (request, _, transcript), prefix in zip(self._step, prefixes, strict=True):
            rows = request.queries
            keys, values = (torch.cat([a, b[rows].float()]) for a, b in zip(prefix, (k, v), strict=True))
            expected = _attention(q[rows], keys, values, scaling)
            error = (out[rows].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
            if not (error <= tolerance).all():
                raise SoakMismatch(
                    f"request {transcript.rid}, layer {layer}: attention to {request.prefix_len} earlier tokens is off by "
                    f"{error.nan_to_num(float('inf')).max().item():.2g} of its norm"
                )
        if layer == len(self.storage.layers) - 1:
            self._count()
        return out

    def store(self, layer, plan, k, v):
        self._inner.store(layer, plan, k, v)

    def _read(self, layer, request, page_ids, transcript):
        """K and V as the cache returns them for the request's tokens before the step; raises SoakMismatch."""
        storage, length = self.storage, request.prefix_len
        where = f"request {transcript.rid}, layer {layer}, {length} tokens, {request.packed_end} of them in pages"
        try:
            parts = list(prefix_parts(storage, layer, request, page_ids, EVERYTHING))
        except (IndexError, RuntimeError, ValueError) as e:
            raise SoakMismatch(f"{where}: they cannot be read: {e}") from e
        empty = torch.empty(0, storage.kv_heads, storage.head_dim)
        read = [torch.cat(rows) for rows in zip((empty, empty), *parts, strict=True)]
        sinks = storage.layers[layer].key.sinks.shape[1]
        for half, rows in enumerate(read):
            expected = transcript.seen(layer, half, length, storage.residual_length, sinks)
            if rows.shape != expected.shape:
                raise SoakMismatch(f"{where}: {rows.shape[0]} were returned")
            if not torch.equal(rows, expected):
                wrong = (rows != expected).flatten(1).any(1).nonzero().flatten().tolist()
                raise SoakMismatch(f"{where}: {len(wrong)} {'KV'[half]} differ, from {wrong[0]} to {wrong[-1]}")
        return read

    def _count(self):
        sinks = max(half.sinks.shape[1] for half in self.storage.keys)
        for request, _, _ in self._step:
            kept = min(sinks, request.packed_end)
            self.compared["sink"] += kept
            self.compared["page"] += request.packed_end - kept
            self.compared["ring"] += request.prefix_len - request.packed_end


def _attention(q, k, v, scaling):
    """Causal attention in float32: q [new, heads, dim] ends where k and v [tokens, kv_heads, dim] end."""
    group = q.shape[1] // k.shape[1]
    visible = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    q, k, v = q.float().transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling).transpose(0, 1)
