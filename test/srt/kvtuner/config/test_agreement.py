"""What ranks with different formats, or without one, are told."""

import datetime
import json

import pytest
import torch.distributed as dist

from sglang.srt.kvtuner.config import agreement
from sglang.srt.kvtuner.config.cache_format import build_cache_format
from sglang.srt.kvtuner.config.flags import KVTunerConfig


def cache_format(page_size=64, num_layers=2, **settings):
    return build_cache_format(KVTunerConfig(**settings), num_layers=num_layers, head_dim=64, page_size=page_size)


def announcement(host="a", version="1", **settings):
    """What a rank announces."""
    mine = cache_format(**settings)
    return {"digest": mine.digest(), "host": host, "version": version, "settings": mine.settings()}


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


def test_another_version_is_part_of_the_difference():
    ranks = [announcement(), announcement(version="2", asym=True)]
    (problem,) = agreement._problems(ranks[0], ranks)
    assert "sglang version: here 1, there 2" in problem


def test_silent_ranks_are_named(monkeypatch):
    monkeypatch.setattr(agreement, "TIMEOUT", datetime.timedelta(milliseconds=100))
    store = dist.HashStore()
    for rank in (0, 2):
        store.set(f"plan/{rank}", json.dumps(announcement()))
    with pytest.raises(RuntimeError, match="ranks 1, 3 announced no cache format .* with --enable-kvtuner-quant"):
        agreement._await_announcements(store, "rank 0", 4)


def test_a_store_that_is_gone_points_to_node_0():
    class Gone:
        def wait(self, *unused):
            raise dist.DistNetworkError("connection reset")

        check = wait

    with pytest.raises(RuntimeError, match="rank 0's node ended before every rank had announced its cache format"):
        agreement._await_announcements(Gone(), "rank 1", 2)


@pytest.mark.parametrize(
    "theirs, expected",
    [
        (cache_format(residual_length=64), ["residual_length: here 128, there 64"]),
        (cache_format(sink_length=4), ["sink_length: here 0, there 4 (all layers)"]),
        (cache_format(num_layers=3), ["layers: here 2, there 3"]),
        (cache_format(page_size=128), ["page_size: here 64, there 128"]),
        (cache_format(hadamard_key=True), ["key hadamard: here 0, there 64 (all layers)"]),
        (cache_format(nbits_key=8), ["key nbits: here 4, there 8 (all layers)"]),
    ],
)
def test_differences_name_the_setting_and_both_values(theirs, expected):
    assert agreement.differences(cache_format().settings(), theirs.settings()) == expected


def test_differences_name_the_layers():
    theirs = cache_format().settings()
    theirs["layers"][1]["value"]["nbits"] = 2
    assert agreement.differences(cache_format().settings(), theirs) == ["value nbits: here 4, there 2 (layer 1)"]
