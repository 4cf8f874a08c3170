"""The real premises: complete and clean on the pinned release, and each planted change of it is reported by name."""

import os
import shutil

import pytest

from backend import premises, review, uses
from backend.pin import Pin
from backend.surface import Surface

PLANTS = {
    "a removed import": (
        "sglang/srt/runtime_context.py",
        "def get_schedule(",
        "def get_scheduling(",
        "sglang.srt.runtime_context:get_schedule: missing",
    ),
    "a changed signature": (
        "sglang/srt/layers/attention/base_attn_backend.py",
        "def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int)",
        "def init_cuda_graph_state(self, max_bs: int)",
        "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.init_cuda_graph_state: changed",
    ),
    "a new argument": (
        "sglang/srt/arg_groups/fields/device.py",
        "    base_gpu_id: A[",
        "    enable_warp_drive: A[bool, 'faster'] = False\n    base_gpu_id: A[",
        "argument:enable_warp_drive: a new argument",
    ),
    "a renamed buffer": (
        "sglang/srt/mem_cache/memory_pool.py",
        "self.req_to_token =",
        "self.request_to_token =",
        "sglang.srt.mem_cache.memory_pool:ReqToTokenPool.req_to_token: missing",
    ),
}


@pytest.fixture(scope="module")
def used(tree):
    return uses.find(Surface(tree))


def problems(used, tree):
    judged = premises.judge(used, premises.Record.load(), Surface(tree))
    return [item.detail for item in judged if item.status != review.OK]


def test_all_that_own_code_uses_is_recorded_and_fits(used, tree):
    assert problems(used, tree) == [], "run fork.py record and read what it added"
    assert premises.Record.load().release == Pin.load().version


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_change_is_reported_by_name(used, tree, tmp_path, plant):
    name, before, after, expected = PLANTS[plant]
    copy = tmp_path / "sglang"
    shutil.copytree(tree / "sglang", copy, copy_function=os.link)
    path = tmp_path / name
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.unlink()  # the copy's link, not the release's file
    path.write_text(text.replace(before, after), encoding="utf-8")
    assert any(problem.startswith(expected) for problem in problems(used, tmp_path))


def test_no_premise_has_upstreams_source():
    recorded = premises.Record.load()
    fingerprints = [*recorded.used.values(), *recorded.arguments.values()]
    assert all(len(text) in (0, 16) and not text.strip("0123456789abcdef") for text in fingerprints)
