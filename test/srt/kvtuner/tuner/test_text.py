"""Texts: sources, the split, and what is refused."""

import pytest
import torch

from sglang.srt.kvtuner.tuner.errors import TuningError
from sglang.srt.kvtuner.tuner.text import Windows, read_source, split_text


class Characters:
    """A tokenizer of one token per character."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return list(map(ord, text))


@pytest.fixture
def write(tmp_path):
    def write(text, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def split(source, eval_source=None, counts=(1, 2, 1), window=4):
    return split_text(Characters(), source, eval_source, counts=counts, window=window)


def as_text(windows):
    return ["".join(map(chr, row)) for row in windows.ids.tolist()]


def test_parts_follow_one_another(write):
    parts = split(write("abcdefghijklmnopqrst"))
    assert list(map(as_text, (parts.calibration, parts.search, parts.final))) == [["abcd"], ["efgh", "ijkl"], ["mnop"]]


def test_the_final_text_may_be_another(write):
    parts = split(write("abcdefghijkl"), write("0123", "other.txt"))
    assert as_text(parts.search) == ["efgh", "ijkl"] and as_text(parts.final) == ["0123"]


def test_parts_must_be_disjoint(write):
    path = write("abcdefghijkl")
    with pytest.raises(TuningError, match="a window of the final evaluation text occurs in an earlier part"):
        split(path, path)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("abcdefghijklmno", r"has 15 tokens; 16 are needed \(1 \+ 2 \+ 1 windows of 4\)"),
        (b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_unusable_text_is_refused_by_name(write, text, problem):
    path = write(text)
    with pytest.raises(TuningError, match=problem) as caught:
        split(path)
    assert str(caught.value).startswith(f"--text {path}")


def test_a_short_evaluation_text_names_its_own_flag(write):
    with pytest.raises(TuningError, match="--eval-text .*short.txt has 3 tokens; 4 are needed"):
        split(write("abcdefghijkl"), write("012", "short.txt"))


def test_what_is_neither_file_nor_data_set_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TuningError, match="--text no/such-text: no such file, and no such Hugging Face data set"):
        read_source("--text", "no/such-text")


@pytest.fixture
def write_dataset(tmp_path):
    """A local data set of Parquet files; call with rows per split and their column."""
    pytest.importorskip("datasets", reason="data sets are read with the datasets package")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the datasets package reads Parquet files with pyarrow")
    import pyarrow

    def write(column="text", **splits):
        folder = tmp_path / column
        folder.mkdir()
        for split, rows in splits.items():
            table = pyarrow.table({"id": list(range(len(rows))), column: rows})
            parquet.write_table(table, folder / f"{split}.parquet")
        return str(folder)

    return write


def test_data_sets(write_dataset):
    name = write_dataset(test=["One.", "Two."], train=["Three."])
    assert read_source("--text", name) == read_source("--text", f"{name}:default") == "One.\n\nTwo."
    assert read_source("--text", f"{name}:default:train") == read_source("--text", f"{name}::train") == "Three."
    assert read_source("--text", write_dataset("content", test=["Four."])) == "Four."


def test_a_data_set_without_text_is_refused(write_dataset):
    with pytest.raises(TuningError, match="--text .*: the data set's columns are id, words; text or content is needed"):
        read_source("--text", write_dataset("words", test=["One."]))


def test_a_split_that_the_data_set_lacks_is_named(write_dataset):
    name = write_dataset(train=["One."])
    with pytest.raises(TuningError, match="--eval-text .*no such Hugging Face data set can be loaded .*test.*train"):
        read_source("--eval-text", name)


def test_the_sample_is_long_enough_for_the_defaults():
    # English prose has more than a token per word with any tokenizer.
    assert len(read_source("--text", "builtin").split()) > 4400


def test_digests_tell_texts_apart():
    assert Windows(torch.tensor([[1, 2]])).digest() != Windows(torch.tensor([[1, 3]])).digest()
