"""An independent simulation of the quantized cache: a Hugging Face model whose attention sees fake-quantized K and V.

It shares no code with the product: the quantizer is written as rounding to a grid, the cache as one mask. A query in
prefill chunk c sees keys and values of earlier chunks quantized and those of its own chunk in full precision, which
is what a server with residual length 0 and ``--chunked-prefill-size`` of that chunk computes.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """Bits, symmetry, axes (0 per token, 1 per channel), group size, rotation of keys and sinks of a simulated cache."""

    bits_key: int
    bits_value: int
    asym: bool = False
    axis_key: int = 0
    axis_value: int = 0
    group: int = 64
    hadamard_key: bool = False
    sinks: int = 0

    def flags(self):
        """The same recipe as server flags."""
        return [
            "--enable-kvtuner-quant",
            *("--kvtuner-nbits-key", str(self.bits_key), "--kvtuner-nbits-value", str(self.bits_value)),
            *("--kvtuner-asym", str(self.asym).lower()),
            *("--kvtuner-axis-key", str(self.axis_key), "--kvtuner-axis-value", str(self.axis_value)),
            *("--kvtuner-q-group-size", str(self.group)),
            *("--kvtuner-hadamard-key", str(self.hadamard_key).lower()),
            *("--kvtuner-sink-length", str(self.sinks)),
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


def hadamard_matrix(head_dim):
    """The orthonormal block-diagonal matrix that keys are rotated by: Sylvester's Hadamard matrices of the largest power
    of two that divides ``head_dim``, float32 [head_dim, head_dim]."""
    block = torch.ones(1, 1)
    while head_dim % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)]) / 2**0.5
    return torch.block_diag(*[block] * (head_dim // len(block)))


def _stored(step):
    return step.half().float()


def window_logprobs(checkpoint, windows, recipe, chunk=128):
    """Log-probabilities of every token but the first of each window (lists of token ids of one length that is a
    multiple of ``chunk``), float32 [windows, length - 1].

    ``recipe`` None leaves the cache as it is.
    """
    found = []
    for window, logprobs in zip(windows, _distributions(checkpoint, windows, recipe, chunk)):
        found.append(logprobs[:-1].gather(-1, torch.tensor(window[1:])[:, None]).squeeze(-1))
    return torch.stack(found)


def window_divergence(checkpoint, windows, recipes, chunk=128):
    """Mean Kullback-Leibler divergence (nats per token) of the next token's distribution, unquantized cache against each
    of ``recipes``; windows as in :func:`window_logprobs`."""
    exact = list(_distributions(checkpoint, windows, None, chunk))
    found = []
    for recipe in recipes:
        pairs = zip(exact, _distributions(checkpoint, windows, recipe, chunk))
        found.append(sum((p.exp() * (p - q)).sum(-1).mean().item() for p, q in pairs) / len(windows))
    return found


def _distributions(checkpoint, windows, recipe, chunk):
    """Log-probabilities of the token after each of every window's, float32 [length, vocabulary] per window."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, attention_mask, scaling=None, **unused):
        return _attend(query, key, value, scaling, recipe, chunk), None

    ALL_ATTENTION_FUNCTIONS.register("fake_quantized", attention)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="fake_quantized"
    ).eval()
    for window in windows:
        with torch.no_grad():
            yield model(torch.tensor([window]), use_cache=False).logits[0].float().log_softmax(-1)


def _attend(query, key, value, scaling, recipe, chunk):
    tokens, repeats = query.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(tokens)
    own_chunk = position[:, None] // chunk == position[None, :] // chunk
    causal = position[:, None] >= position[None, :]

    keys, values = [key, key], [value, value]
    if recipe is not None:
        # The matrix is symmetric and orthonormal: it is its own inverse.
        rotation = hadamard_matrix(key.shape[-1]) if recipe.hadamard_key else torch.eye(key.shape[-1])
        stored = fake_quantize(key.float() @ rotation, recipe.bits_key, recipe.asym, recipe.axis_key, recipe.group)
        keys[1] = stored @ rotation
        values[1] = fake_quantize(value, recipe.bits_value, recipe.asym, recipe.axis_value, recipe.group)
        for exact, quantized in (keys, values):
            quantized[..., : recipe.sinks, :] = exact[..., : recipe.sinks, :]
    keys, values = ([t.float().repeat_interleave(repeats, dim=1) for t in pair] for pair in (keys, values))
    logits = [query.float() @ k.transpose(-1, -2) * scaling for k in keys]
    weights = torch.where(own_chunk, *logits).masked_fill(~causal, float("-inf")).softmax(-1)
    out = (weights * own_chunk) @ values[0] + (weights * ~own_chunk) @ values[1]
    return out.transpose(1, 2).contiguous().to(query.dtype)
