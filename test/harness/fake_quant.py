"""An independent simulation of the quantized cache: a Hugging Face model whose attention sees fake-quantized K and V.

It shares no code with the product: the quantizer is written as rounding to a grid, the cache as one number per query, how
many of the first tokens it sees quantized. Tokens of whole pages are packed once R tokens, the residual length, came after
the page. A query in a prefill chunk sees what was packed when its chunk began, a decoded token's what was packed before
its own step; everything else it sees in full precision.
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


def packed_lengths(length, *, chunk, prompt=None, page=64, residual=0):
    """How many of the first tokens each of ``length`` queries sees quantized, int64 [length].

    The first ``prompt`` tokens (all where None) are prefilled in chunks of ``chunk`` tokens, the others decoded one by
    one.
    """
    position = torch.arange(length)
    prefilled = position < (length if prompt is None else prompt)
    before = torch.where(prefilled, position // chunk * chunk, position)
    return (before - residual).clamp(min=0) // page * page


def window_logprobs(checkpoint, windows, recipe, chunk=128):
    """Log-probabilities of every token but the first of each window, prefilled at residual length 0: lists of token ids of
    one length, float32 [windows, length - 1].

    ``recipe`` None leaves the cache as it is.
    """
    packed = packed_lengths(len(windows[0]), chunk=chunk)
    return torch.stack(sequence_logprobs(checkpoint, windows, recipe, [packed] * len(windows)))


def sequence_logprobs(checkpoint, sequences, recipe, packed):
    """Log-probabilities of every token but the first of each sequence, a list of float32 [length - 1].

    packed: per sequence what its queries see quantized, see :func:`packed_lengths`.
    """
    return [
        logprobs[:-1].gather(-1, torch.tensor(sequence[1:])[:, None]).squeeze(-1)
        for sequence, logprobs in zip(sequences, _distributions(checkpoint, sequences, recipe, packed), strict=True)
    ]


def window_divergence(checkpoint, windows, recipes, chunk=128):
    """Mean Kullback-Leibler divergence (nats per token) of the next token's distribution, unquantized cache against each
    of ``recipes``; windows as in :func:`window_logprobs`."""
    packed = [packed_lengths(len(window), chunk=chunk) for window in windows]
    exact = list(_distributions(checkpoint, windows, None, packed))
    found = []
    for recipe in recipes:
        pairs = zip(exact, _distributions(checkpoint, windows, recipe, packed))
        found.append(sum((p.exp() * (p - q)).sum(-1).mean().item() for p, q in pairs) / len(windows))
    return found


def _distributions(checkpoint, sequences, recipe, packed):
    """Log-probabilities of the token after each of every sequence's, float32 [length, vocabulary] per sequence."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, attention_mask, scaling=None, **unused):
        return attend(query, key, value, scaling, recipe, seen).to(query.dtype), None

    ALL_ATTENTION_FUNCTIONS.register("fake_quantized", attention)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="fake_quantized"
    ).eval()
    for sequence, seen in zip(sequences, packed, strict=True):  # noqa: B007  (attention() reads it)
        with torch.no_grad():
            yield model(torch.tensor([sequence]), use_cache=False).logits[0].float().log_softmax(-1)


def attend(query, key, value, scaling, recipe, packed):
    """Causal attention in which query i sees the first ``packed[i]`` tokens quantized, float32 [batch, tokens, heads,
    head_dim].

    query: [batch, heads, tokens, head_dim]; key, value: [batch, kv_heads, tokens, head_dim]; packed: int64 [tokens].
    """
    tokens, repeats = query.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(tokens)
    quantized = position[None, :] < packed[:, None]
    causal = position[:, None] >= position[None, :]

    keys, values = [key.float(), key.float()], [value.float(), value.float()]
    if recipe is not None:
        # Whole pages alone, which is all that anybody sees quantized: groups along tokens fill no unfinished page.
        whole = slice(recipe.sinks, int(packed.max()))
        # The matrix is symmetric and orthonormal: it is its own inverse.
        rotation = hadamard_matrix(key.shape[-1]) if recipe.hadamard_key else torch.eye(key.shape[-1])
        rotated, plain = keys[1][..., : whole.stop, :] @ rotation, values[1][..., : whole.stop, :]
        stored_keys = fake_quantize(rotated, recipe.bits_key, recipe.asym, recipe.axis_key, recipe.group) @ rotation
        stored_values = fake_quantize(plain, recipe.bits_value, recipe.asym, recipe.axis_value, recipe.group)
        for pair, stored in ((keys, stored_keys), (values, stored_values)):
            pair[1] = pair[0].clone()
            pair[1][..., whole, :] = stored[..., recipe.sinks :, :]
    keys, values = ([t.repeat_interleave(repeats, dim=1) for t in pair] for pair in (keys, values))
    logits = [query.float() @ k.transpose(-1, -2) * scaling for k in keys]
    weights = torch.where(quantized, logits[1], logits[0]).masked_fill(~causal, float("-inf")).softmax(-1)
    out = (weights * ~quantized) @ values[0] + (weights * quantized) @ values[1]
    return out.transpose(1, 2).contiguous()
