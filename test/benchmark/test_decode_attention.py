"""The benchmark of decode attention runs, on a shape too small to time anything."""

import json

import decode_attention
from harness.kernels import cpu_kernels


def test_it_compares_variants_with_the_reference_and_reports_them(tmp_path, monkeypatch, capsys):
    cpu_kernels()
    monkeypatch.setattr(decode_attention, "BUFFER_BYTES", 1 << 20)
    out = tmp_path / "results.json"
    shape = [
        "--context",
        "300",
        "--batch",
        "2",
        "--bits-key",
        "4",
        "8",
        "--bits-value",
        "2",
        "8",
        "--asym",
        "--hadamard-key",
    ]
    decode_attention.main([*shape, "--no-upstream", "--repeats", "2", "--residual-length", "64", "--json", str(out)])
    results = json.loads(out.read_text())["results"]
    assert [r["variant"] for r in results] == ["bfloat16", "K4V2", "K8V8"]
    assert all(0 < r["error"] < decode_attention.TOLERANCE and r["bytes"] > 0 for r in results)
    assert "K4V2" in capsys.readouterr().out
