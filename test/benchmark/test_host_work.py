"""The benchmark of the host's work runs, on a shape too small to time anything, and says what is too much."""

import json
from dataclasses import replace

import pytest
import triton

import host_work
from host_work import Result, shortcomings

SMALL = ["--layers", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--batch", "3", "--context", "64"]
RESULT = Result("none", "eager", 7, 8, ours=130, upstream=100, ratio=1.3, ours_best=1, upstream_best=1, ratio_of_best=1)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: launches would run kernels")
def test_it_compares_the_backends_and_reports_them(tmp_path, capsys):
    out = tmp_path / "results.json"
    assert host_work.main([*SMALL, "--repeats", "2", "--limit", "inf", "--json", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert [(r["launcher"], r["step"]) for r in results] == [
        (launcher, step) for launcher in ("none", "binding") for step in ("eager", "replay")
    ]
    # Upstream's: two kernels and a store in each layer; the lengths' splits and the token slots once.
    assert [(r["launches"], r["launches_upstream"]) for r in results] == [(7, 8), (0, 2)] * 2
    assert all(r["ours"] > 0 and r["upstream"] > 0 for r in results)
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, []),
        ({"launches": 8}, ["eager: 8 launches, more than 7"]),
        ({"ratio": 1.31}, ["eager, launcher none: 1.31 times upstream's, more than 1.3"]),
    ],
)
def test_too_much_is_named(change, said):
    assert shortcomings([replace(RESULT, **change)], layers=2, limit=1.3) == said
