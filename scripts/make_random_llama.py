#!/usr/bin/env python3
"""Make a small Llama checkpoint with random weights, for tests that need a shape and not knowledge.

The same options give the same files. Weights are scaled so that attention decides what comes next: greedy output is
varied and depends on the whole prompt. The tokenizer is a byte-level one made here, or another checkpoint's.

Needs torch, transformers and safetensors, all of which come with sglang.
"""

import argparse
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoint_files import make_folder, write_json

# Raise it when what this script writes changes, so that older folders are made again.
LAYOUT = 1

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Shape:
    """The options of a random checkpoint; ``vocab`` is at least 259 with the tokenizer made here."""

    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 128
    hidden: int = 256
    intermediate: int = 512
    vocab: int = 1024
    dtype: str = "float32"
    seed: int = 0


def make(output, shape=Shape(), tokenizer_from=None, say=print):
    """Make the checkpoint in ``output`` unless it is there already, and return the folder.

    Raises:
        ValueError: the shape is impossible, or the vocabulary is smaller than the tokenizer's.
        FileExistsError: ``output`` exists and was not made by this script.
    """
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ValueError("heads must be a multiple of kv-heads, and head-dim even")

    def build(folder):
        if tokenizer_from is None:
            _write_byte_tokenizer(folder, shape.vocab)
        else:
            _copy_tokenizer(Path(tokenizer_from), folder, shape.vocab)
        write_json(folder / "config.json", _config(folder, shape))
        _write_weights(folder / "model.safetensors", shape)

    source = None if tokenizer_from is None else str(Path(tokenizer_from).resolve())
    return make_folder(output, {**asdict(shape), "tokenizer_from": source, "layout": LAYOUT}, build, say)


def _write_byte_tokenizer(folder, vocab):
    """A tokenizer with one token per byte, three special ones, and named fillers up to the vocabulary's size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocab < len(tokens):
        raise ValueError(f"vocab must be at least {len(tokens)}")
    # A filler has no merge that leads to it, but it can be decoded: the model may well produce it.
    tokens += [f"[{number}]" for number in range(len(tokens), vocab)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **SPECIAL
    ).save_pretrained(folder)


def _copy_tokenizer(source, folder, vocab):
    from tokenizers import Tokenizer

    size = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
    if vocab < size:
        raise ValueError(f"vocab must be at least {size}, the size of the tokenizer in {source}")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)


def _config(folder, shape):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "vocab_size": shape.vocab,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": shape.dtype,
    }


def _write_weights(path, shape):
    """Write weights drawn from normal distributions.

    A projection without a gain keeps the scale of its input. Queries and keys are larger, so that attention picks out
    few tokens, and its output is, so that it counts against the embedding; without both, greedy output soon repeats.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(shape.seed)
    dtype = getattr(torch, shape.dtype)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(rows, columns, gain=1.0):
        return (torch.randn(rows, columns, generator=generator) * (gain * columns**-0.5)).to(dtype)

    def ones():
        return torch.ones(shape.hidden, dtype=dtype)

    weights = {"model.embed_tokens.weight": matrix(shape.vocab, shape.hidden, gain=shape.hidden**0.5)}
    for layer in range(shape.layers):
        block = {
            "input_layernorm": ones(),
            "self_attn.q_proj": matrix(queries, shape.hidden, gain=2.5),
            "self_attn.k_proj": matrix(keys, shape.hidden, gain=2.5),
            "self_attn.v_proj": matrix(keys, shape.hidden),
            "self_attn.o_proj": matrix(shape.hidden, queries, gain=4.0),
            "post_attention_layernorm": ones(),
            "mlp.gate_proj": matrix(shape.intermediate, shape.hidden),
            "mlp.up_proj": matrix(shape.intermediate, shape.hidden),
            "mlp.down_proj": matrix(shape.hidden, shape.intermediate),
        }
        weights.update({f"model.layers.{layer}.{name}.weight": value for name, value in block.items()})
    weights["model.norm.weight"] = ones()
    # Logits with a standard deviation of a few units: the best token is clear, so tiny differences seldom swap it.
    weights["lm_head.weight"] = matrix(shape.vocab, shape.hidden, gain=3.0)
    save_file(weights, path, metadata={"format": "pt"})


def main(arguments=None):
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    for name, default in asdict(Shape()).items():
        choices = ("float32", "bfloat16") if name == "dtype" else None
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, choices=choices, help="default: %(default)s")
    parser.add_argument("--tokenizer-from", type=Path, help="checkpoint folder whose tokenizer to copy")
    options = vars(parser.parse_args(arguments))
    output, tokenizer_from = options.pop("output"), options.pop("tokenizer_from")
    try:
        make(output, Shape(**options), tokenizer_from)
    except (OSError, ValueError) as error:
        print(f"make_random_llama: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
