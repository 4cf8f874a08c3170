"""A model whose keys and values, in every layer, are a function of token and position alone.

Attention and MLP add nothing to the residual stream, so every layer sees the token's embedding. Projections pick channels and
scale them by powers of two, and all embeddings have one exact norm: the same token at the same position gives the same bits
whatever batch computes it. Logits are all zero: sampling draws any token.
"""

import torch
from safetensors.torch import save_file

from checkpoint_files import make_folder, write_json
from harness.models import MODELS

# Raise it when what this module writes changes, so that older folders are made again.
LAYOUT = 1

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, CONTEXT = 2, 4, 2, 32, 64, 512, 768

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def soak_checkpoint():
    """Folder of the model's checkpoint, without a tokenizer; made on first use."""
    mark = {"config": CONFIG, "layout": LAYOUT}
    return make_folder(MODELS / "soak", mark, _write, say=lambda line: None)


class TokenFunction:
    """K and V of any token at any position, from the modules of a loaded model."""

    def __init__(self, model):
        self._layers = [layer.self_attn for layer in model.model.layers]
        embeddings = model.model.embed_tokens.weight
        with torch.no_grad():
            projected = [layer.self_attn.qkv_proj(layer.input_layernorm(embeddings))[0] for layer in model.model.layers]
        sizes = [(layer.q_size, layer.kv_size, layer.kv_size) for layer in self._layers]
        self._tables = [qkv.split(size, dim=-1) for qkv, size in zip(projected, sizes, strict=True)]

    def rows(self, layer, tokens, positions):
        """K and V, [tokens, kv_heads, head_dim] each in the model's dtype; ``tokens`` and ``positions`` int64 [tokens]."""
        q, k, v = (table[tokens] for table in self._tables[layer])
        _, k = self._layers[layer].rotary_emb(positions, q, k)
        return k.view(-1, KV_HEADS, HEAD_DIM), v.view(-1, KV_HEADS, HEAD_DIM)


def _write(folder):
    write_json(folder / "config.json", CONFIG)
    generator = torch.Generator().manual_seed(0)

    def pick(rows, gain):
        """[rows, HIDDEN]: every row picks one channel, every channel as often as the others."""
        channels = torch.cat([torch.randperm(HIDDEN, generator=generator) for _ in range(rows // HIDDEN)])
        signs = torch.randint(0, 2, (rows,), generator=generator) * 2.0 - 1
        # Channels differ in size, as those of keys do, by powers of two.
        sizes = 2.0 ** torch.randint(-2, 2, (rows,), generator=generator)
        return torch.zeros(rows, HIDDEN).index_put_((torch.arange(rows), channels), signs * sizes * gain)

    def zeros(rows):
        return torch.zeros(rows, HIDDEN)

    magnitudes = torch.tensor([0.5, 0.75, 1.0, 1.5]).repeat(HIDDEN // 4)  # squares and their sums are exact
    order = torch.rand(VOCAB, HIDDEN, generator=generator).argsort(dim=1)
    signs = torch.randint(0, 2, (VOCAB, HIDDEN), generator=generator) * 2.0 - 1
    weights = {"model.embed_tokens.weight": magnitudes[order] * signs}
    for layer in range(LAYERS):
        block = {
            "input_layernorm": torch.ones(HIDDEN),
            "self_attn.q_proj": pick(HEADS * HEAD_DIM, 1.0),
            "self_attn.k_proj": pick(KV_HEADS * HEAD_DIM, 1.0),
            "self_attn.v_proj": pick(KV_HEADS * HEAD_DIM, 1.0),
            "self_attn.o_proj": torch.zeros(HIDDEN, HEADS * HEAD_DIM),
            "post_attention_layernorm": torch.ones(HIDDEN),
            "mlp.gate_proj": zeros(HIDDEN),
            "mlp.up_proj": zeros(HIDDEN),
            "mlp.down_proj": zeros(HIDDEN),
        }
        weights.update({f"model.layers.{layer}.{name}.weight": value for name, value in block.items()})
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    weights["lm_head.weight"] = zeros(VOCAB)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
