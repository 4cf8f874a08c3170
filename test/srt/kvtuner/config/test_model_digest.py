"""What tells checkpoints apart, and what does not."""

import json
import os

import pytest
from safetensors.numpy import save_file

from sglang.srt.kvtuner.config import model_digest

np = pytest.importorskip("numpy")


def files(folder):
    """As ranks see a folder for the first time."""
    model_digest.weight_files.cache_clear()
    return model_digest.weight_files(str(folder))


def folder_of(tmp_path, name="model", **contents):
    folder = tmp_path / name
    folder.mkdir()
    for file, content in contents.items():
        (folder / file.replace("__", ".")).write_bytes(content)
    return folder


@pytest.fixture
def large(tmp_path):
    """A file too large to be read whole; sparse, so that it costs nothing."""
    path = tmp_path / "large" / "model.safetensors"
    path.parent.mkdir()
    with open(path, "wb") as file:
        file.truncate(8 * model_digest.WHOLE)
    return path


def test_the_same_content_in_another_place_is_the_same(tmp_path):
    first, second = (folder_of(tmp_path, name, model__safetensors=b"abc") for name in "ab")
    assert files(first) == files(second) == {"model.safetensors": "3 bytes, sample ba7816bf8f01"}


def test_one_bit_in_a_small_file_is_seen(tmp_path):
    first, second = (folder_of(tmp_path, name, model__bin=content) for name, content in (("a", b"ab"), ("b", b"ac")))
    assert files(first) != files(second)


def test_other_weights_of_the_same_shape_are_seen(tmp_path):
    for name in "ab":
        folder = folder_of(tmp_path, name)
        values = np.random.default_rng(ord(name)).standard_normal((2304, 2304)).astype(np.float32)
        save_file({"weight": values}, folder / "model.safetensors")
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    sizes = [found["model.safetensors"].split(",")[:3] for found in (first, second)]
    assert sizes[0] == sizes[1] and (tmp_path / "a/model.safetensors").stat().st_size > model_digest.WHOLE
    assert first != second


@pytest.mark.parametrize("offset", [0, model_digest.EDGE - 1, -1, -model_digest.EDGE])
def test_the_edges_of_a_large_file_are_seen(large, offset):
    before = model_digest.describe_file(large)
    with open(large, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(b"x")
    assert model_digest.describe_file(large) != before


def test_a_matrix_in_the_middle_of_a_large_file_is_seen(large):
    before = model_digest.describe_file(large)
    size = large.stat().st_size
    with open(large, "r+b") as file:
        file.seek(size // 3)
        file.write(b"x" * (size // model_digest.SAMPLES))
    assert model_digest.describe_file(large) != before


def test_a_header_longer_than_the_edge_is_seen_whole(large):
    length = 3 * model_digest.EDGE
    with open(large, "r+b") as file:
        file.write(length.to_bytes(8, "little"))
        before = model_digest.describe_file(large)
        file.seek(length)
        file.write(b"x")
    assert model_digest.describe_file(large) != before


def test_little_of_a_large_file_is_read(large):
    with open(large, "rb", buffering=0) as file:
        read = sum(length for _, length in model_digest._places(file, 5 << 30, True))
    assert read == 2 * model_digest.EDGE + model_digest.SAMPLES * model_digest.SAMPLE


def test_another_size_is_seen(large):
    before = model_digest.describe_file(large)
    os.truncate(large, large.stat().st_size + 1)
    assert model_digest.describe_file(large).split(" bytes")[0] != before.split(" bytes")[0]


def test_what_is_not_loaded_is_not_compared(tmp_path):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    contents = {"model-1__safetensors": b"1", "model-2__safetensors": b"2", "consolidated__safetensors": b"12"}
    folder = folder_of(tmp_path, **contents, pytorch_model__bin=b"12", README__md=b"")
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert list(files(folder)) == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": {"a": "gone.safetensors"}}'])
def test_an_index_that_says_nothing_leaves_all_files(tmp_path, index):
    folder = folder_of(tmp_path, a__safetensors=b"1", b__safetensors=b"2")
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert list(files(folder)) == ["a.safetensors", "b.safetensors"]


def test_files_of_training_are_no_weights(tmp_path):
    folder = folder_of(tmp_path, pytorch_model__bin=b"1", training_args__bin=b"2", optimizer__pt=b"3")
    assert list(files(folder)) == ["pytorch_model.bin"]


def test_a_single_file_may_have_another_name(tmp_path):
    folder = folder_of(tmp_path, a__gguf=b"1", b__gguf=b"1")
    assert files(folder / "a.gguf") == files(folder / "b.gguf")


def test_a_name_is_no_local_model(tmp_path):
    assert files(tmp_path / "someone" / "model") is None
    assert model_digest.tokenizer_files(str(tmp_path / "someone")) is None


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert files(tmp_path) == {"model.safetensors": "unreadable (Is a directory)"}


def test_tokenizers_are_told_apart(tmp_path):
    first, second = (folder_of(tmp_path, n, tokenizer__json=n.encode(), config__json=b"{}") for n in "ab")
    found = [model_digest.tokenizer_files(str(folder)) for folder in (first, second)]
    assert [list(names) for names in found] == [["tokenizer.json"]] * 2 and found[0] != found[1]
