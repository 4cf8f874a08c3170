"""What ranks with different formats, or without one, are told."""

import dataclasses
import datetime

import pytest
import torch.distributed as dist

from sglang.srt.kvtuner.config import agreement
from sglang.srt.kvtuner.config.agreement import Announcement
from sglang.srt.kvtuner.config.cache_format import build_cache_format
from sglang.srt.kvtuner.config.flags import KVTunerConfig


def cache_format(page_size=64, num_layers=2, **settings):
    return build_cache_format(KVTunerConfig(**settings), num_layers=num_layers, head_dim=64, page_size=page_size)


def announcement(host="a", values=None, files=None, **settings):
    """What a rank announces."""
    return Announcement.of(cache_format(**settings), host=host, values=values or {}, files=files or {})


def test_ranks_that_differ_in_the_same_way_are_told_of_once():
    ranks = [announcement(), announcement(), announcement("b", nbits_key=8), announcement("b", nbits_key=8)]
    (problem,) = agreement._problems(ranks[0], ranks)
    assert problem.startswith("ranks 2, 3 on b (cache format ")
    assert problem.endswith(" differ: key nbits: here 4, there 8 (all layers)")


def test_hosts_that_differ_are_told_of_one_by_one():
    ranks = [announcement(), announcement("b", nbits_key=8), announcement("c", nbits_key=2)]
    first, second = agreement._problems(ranks[0], ranks)
    assert first.startswith("rank 1 on b (cache format ")
    assert second.startswith("rank 2 on c (cache format ")


def test_a_host_with_two_sets_of_differences_is_told_of_twice():
    ranks = [announcement(), announcement("b", {"--dtype": "x"}), announcement("b", {"--dtype": "y"})]
    first, second = agreement._problems(ranks[0], ranks)
    assert first.endswith(
        "rank 1 on b (cache format " + ranks[1].format_digest[:12] + ") differs: --dtype: here absent, there x"
    )
    assert second.endswith(" differs: --dtype: here absent, there y")


def test_a_value_is_told_with_its_name_and_both_sides():
    mine, theirs = (
        announcement(values={"--dtype": "float32", "a": "1"}),
        announcement(values={"--dtype": "bfloat16", "a": "1"}),
    )
    assert mine.differences(theirs) == ["--dtype: here float32, there bfloat16"]


def test_files_are_told_by_name_and_the_rest_counted():
    mine = announcement(files={"model weights": {f"{number}.bin": "1" for number in range(6)}})
    theirs = announcement(files={"model weights": {f"{number}.bin": "2" for number in range(5)}})
    assert mine.differences(theirs) == [
        *(f"model weights: file {number}.bin differs (here 1, there 2)" for number in range(3)),
        "model weights: 3 more files differ",
    ]


def test_a_file_that_only_one_side_has_is_told():
    ours, theirs = (announcement(files={"model weights": names}) for names in ({"a": "1", "b": "1"}, {"a": "1"}))
    assert ours.differences(theirs) == ["model weights: file b differs (here 1, there absent)"]
    assert theirs.differences(ours) == ["model weights: file b differs (here absent, there 1)"]


def test_files_that_one_side_could_not_look_at_are_not_compared():
    assert announcement(files={"model weights": {"a": "1"}}).differences(announcement()) == []


def test_a_message_has_an_end():
    many = announcement(values={f"v{number:02}": "1" for number in range(20)})
    (problem,) = agreement._problems(announcement(), [announcement(), many])
    assert "v11: here absent, there 1; and 8 more" in problem and "v12" not in problem


def test_silent_ranks_are_named():
    store = dist.HashStore()
    for rank in (0, 2):
        store.set(f"present/{rank}", "")
    with pytest.raises(RuntimeError, match="ranks 1, 3 announced no cache format .* with --enable-kvtuner-quant"):
        agreement._exchange(store, "present", 0, "", [None] * 4, datetime.timedelta(milliseconds=100))


def test_a_rank_that_waits_says_for_whom(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(agreement, "REMINDER", datetime.timedelta(milliseconds=50))
    store = dist.HashStore()
    store.set("answer/1", "")
    with pytest.raises(RuntimeError, match="ranks 2, 3 on b, c announced no cache format within 0 s"):
        agreement._exchange(store, "answer", 0, "", ["a", "a", "b", "c"], datetime.timedelta(milliseconds=200))
    assert caplog.messages[0] == "Quantized KV cache: waiting for ranks 2, 3 on b, c (0 s)"
    assert 2 <= len(caplog.messages) <= 4


def test_a_value_is_told_with_its_remark():
    mine = announcement(values={"kernels": "fast"})
    theirs = dataclasses.replace(announcement(values={"kernels": "slow"}), remarks={"kernels": "no compiler"})
    assert mine.differences(theirs) == ["kernels: here fast, there slow (no compiler)"]
    assert theirs.differences(dataclasses.replace(theirs, remarks={"kernels": "no linker"})) == []


def test_a_store_that_is_gone_points_to_node_0():
    class Gone:
        def set(self, *unused):
            raise dist.DistNetworkError("connection reset")

        check = set

    with pytest.raises(RuntimeError, match="rank 0's node ended before every rank had announced its cache format"):
        agreement._exchange(Gone(), "present", 1, "", [None] * 2, agreement.TIMEOUT)


@pytest.mark.parametrize(
    "theirs, expected",
    [
        (cache_format(residual_length=64), ["--kvtuner-residual-length: here 128, there 64"]),
        (cache_format(sink_length=4), ["sink_length: here 0, there 4 (all layers)"]),
        (cache_format(num_layers=3), ["layers: here 2, there 3"]),
        (cache_format(page_size=128), ["--page-size: here 64, there 128"]),
        (cache_format(hadamard_key=True), ["key hadamard: here 0, there 64 (all layers)"]),
        (cache_format(nbits_key=8), ["key nbits: here 4, there 8 (all layers)"]),
    ],
)
def test_differences_name_the_setting_and_both_values(theirs, expected):
    assert agreement.format_differences(cache_format().settings(), theirs.settings()) == expected


def test_differences_name_the_layers():
    theirs = cache_format().settings()
    theirs["layers"][1]["value"]["nbits"] = 2
    assert agreement.format_differences(cache_format().settings(), theirs) == ["value nbits: here 4, there 2 (layer 1)"]
