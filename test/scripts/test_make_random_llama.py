"""The small random checkpoints."""

import pytest
import torch

import make_random_llama
from make_random_llama import Shape, make

TINY = Shape(layers=1, heads=2, kv_heads=1, head_dim=8, hidden=16, intermediate=16, vocab=300)


def greedy(folder, text, tokens=48):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    return tokenizer, output[0, prompt["input_ids"].shape[1] :].tolist()


def test_greedy_output_is_varied_and_depends_on_the_start_of_a_long_prompt(random_llama):
    folder = random_llama()
    sentence = "The quick brown fox jumps over the lazy dog. "
    tokenizer, output = greedy(folder, "A" + sentence * 10)
    _, other = greedy(folder, "B" + sentence * 10)
    assert len(set(output)) > 24
    assert output != other
    assert tokenizer.decode(output)


def test_the_same_options_give_the_same_weights(tmp_path):
    first, second = make(tmp_path / "a", TINY), make(tmp_path / "b", TINY)
    other = make(tmp_path / "c", Shape(**{**vars(TINY), "seed": 1}))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second, other)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_the_shape_reaches_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "m", Shape(**{**vars(TINY), "dtype": "bfloat16"})))
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (1, 16, 300)
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_can_be_taken_over(tmp_path, random_llama):
    source = random_llama()
    folder = make(tmp_path / "m", Shape(**{**vars(TINY), "vocab": 2000}), tokenizer_from=source)
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vocab", "100"], "vocab must be at least 259"),
        (["--heads", "6", "--kv-heads", "4"], "heads must be a multiple of kv-heads"),
    ],
)
def test_an_impossible_shape_is_refused(tmp_path, capsys, flags, message):
    assert make_random_llama.main(["--output", str(tmp_path / "m"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
