"""Server arguments through upstream's own construction and resolution, for a model that is only a config.json."""

import json

import pytest

from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.server_args import ServerArgs

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder, **changes):
    """Write a config.json of a small Llama, with changes, and return the folder as the model path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return str(folder)


def server_args(model_path, **fields):
    """Unresolved arguments as an Engine gives them, quantized unless ``enable_kvtuner_quant`` says otherwise."""
    defaults = {"device": "cpu", "skip_tokenizer_init": True, "enable_kvtuner_quant": True}
    return ServerArgs(**{"model_path": model_path, **defaults, **fields})


def resolve(model_path, **fields):
    """Resolve such arguments; returns what is in effect, by field."""
    args = server_args(model_path, **fields)
    args.resolve_once()
    return args.resolved_dict()


def refusal(model_path, **fields):
    """What resolving such arguments is refused with."""
    with pytest.raises(KVTunerConfigError) as caught:
        resolve(model_path, **fields)
    return str(caught.value)
