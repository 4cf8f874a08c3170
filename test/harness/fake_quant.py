"""An independent simulation of the quantized cache: a Hugging Face model whose attention sees fake-quantized K and V.

It shares no code with the product: the quantizer is written as rounding to a grid, the cache as one mask. A query in
prefill chunk c sees keys and values of earlier chunks quantized and those of its own chunk in full precision, which
is what a server with residual length 0 and ``--chunked-prefill-size`` of that chunk computes.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """Bits, symmetry, axes (0 per token, 1 per channel) and group size of a simulated cache."""

    bits_key: int
    bits_value: int
    asym: bool = False
    axis_key: int = 0
    axis_value: int = 0
    group: int = 64

    def flags(self):
        """The same recipe as server flags."""
        return [
            "--enable-kvtuner-quant",
            *("--kvtuner-nbits-key", str(self.bits_key), "--kvtuner-nbits-value", str(self.bits_value)),
            *("--kvtuner-asym", str(self.asym).lower()),
            *("--kvtuner-axis-key", str(self.axis_key), "--kvtuner-axis-value", str(self.axis_value)),
            *("--kvtuner-q-group-size", str(self.group)),
        ]


def fake_quantize(x, bits, asym, axis, group):
    """``x`` [..., tokens, head_dim] rounded to the grid of its groups, in float32; steps are float16, as they are stored."""
    if axis == 1:
        return fake_quantize(x.transpose(-1, -2), bits, asym, 0, group).transpose(-1, -2)
    groups = x.float().reshape(*x.shape[:-1], x.shape[-1] // group, group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if asym:
        step = _stored((high - low).clamp(min=1e-5) / (2**bits - 1))
        first = torch.round(low / step)
    else:
        step = _stored(torch.maximum(high, -low).clamp(min=1e-5) / (2 ** (bits - 1) - 1))
        first = torch.full_like(step, -(2 ** (bits - 1)))
    levels = torch.round(groups / step)
    return (torch.minimum(torch.maximum(levels, first), first + 2**bits - 1) * step).reshape(x.shape)


def _stored(step):
    return step.half().float()


def window_logprobs(checkpoint, windows, recipe, chunk=128):
    """Log-probabilities of every token but the first of each window (lists of token ids of one length that is a
    multiple of ``chunk``), float32 [windows, length - 1].

    ``recipe`` None leaves the cache as it is.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, attention_mask, scaling=None, **unused):
        return _attend(query, key, value, scaling, recipe, chunk), None

    ALL_ATTENTION_FUNCTIONS.register("fake_quantized", attention)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="fake_quantized"
    ).eval()
    found = []
    for window in windows:
        ids = torch.tensor([window])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1))
    return torch.stack(found)


def _attend(query, key, value, scaling, recipe, chunk):
    tokens, repeats = query.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(tokens)
    own_chunk = position[:, None] // chunk == position[None, :] // chunk
    causal = position[:, None] >= position[None, :]

    def seen(x, bits, asym, axis):
        quantized = x if recipe is None else fake_quantize(x, bits, asym, axis, recipe.group)
        return [t.float().repeat_interleave(repeats, dim=1) for t in (x, quantized)]

    settings = recipe or Recipe(16, 16)
    keys = seen(key, settings.bits_key, settings.asym, settings.axis_key)
    values = seen(value, settings.bits_value, settings.asym, settings.axis_value)
    logits = [query.float() @ k.transpose(-1, -2) * scaling for k in keys]
    weights = torch.where(own_chunk, *logits).masked_fill(~causal, float("-inf")).softmax(-1)
    out = (weights * own_chunk) @ values[0] + (weights * ~own_chunk) @ values[1]
    return out.transpose(1, 2).contiguous().to(query.dtype)
