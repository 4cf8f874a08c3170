"""The checkpoint made from the packaged GGUF file."""

import pytest
import torch

import make_smollm2
from make_smollm2 import unpermute


def test_the_model_answers(smollm2_checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(smollm2_checkpoint, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_the_tokenizer_gives_back_what_it_reads(smollm2_checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_checkpoint)
    text = "Don't split 2048  into one token;\n\n\tnaïve café ☕"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(token) for token in ids if tokenizer.decode(token).isdigit()] == list("2048")


def test_a_complete_folder_is_left_alone(smollm2_checkpoint):
    before = (smollm2_checkpoint / "model.safetensors").stat().st_mtime_ns
    lines = []
    assert make_smollm2.make(say=lines.append) == smollm2_checkpoint
    assert lines == [f"{smollm2_checkpoint} is complete"]
    assert (smollm2_checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_someone_else_is_not_replaced(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert make_smollm2.main(["--output", str(tmp_path)]) == 1
    assert "was not made by this script" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 8)])
def test_unpermute_puts_the_rotary_halves_apart(heads, head_dim):
    # In each head, GGUF's rows are: first of the lower half, first of the upper half, second of the lower, ...
    half = head_dim // 2
    original = torch.arange(heads * head_dim)
    stored = [head * head_dim + part * half + i for head in range(heads) for i in range(half) for part in range(2)]
    assert torch.equal(unpermute(original[stored].unsqueeze(1), heads).squeeze(1), original)
