#!/usr/bin/env python3
"""Tune a small real model's cache to at most 4 bits on average, and compare the outcome on text it never saw.

Runs ``kvtuner search`` and ``kvtuner evaluate``. A second run goes on where an interrupted one stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import make_smollm2
from launcher import ROOT, server_environment
from machine import device_flags

# Text that the package does not hold, so that neither pruning nor search can have seen it.
EVAL_TEXT = ROOT / "test" / "data" / "prose.txt"
# Rotated keys leave less to lose than any mix of bits does, and cost no memory (docs/accuracy.md).
RECIPE = ("--kvtuner-hadamard-key", "true")
DEFAULTS = "sym/K-token/V-token/g64:K4V4"
COMPARED = ("unquantized", "K8V8", "K8V4", "K4V4", DEFAULTS)


def main(arguments=None):
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "tune-demo", help="folder (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=64, help="mixes to score (default: %(default)s)")
    parser.add_argument("--recall", type=int, default=0, help="items to ask a server for each configuration")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    model = options.model or make_smollm2.make()
    common = [
        *("--model-path", str(model), "--out", str(options.out), "--text", "builtin", "--eval-text", str(EVAL_TEXT)),
        *("--windows", "1", "3", "8", *RECIPE),
    ]
    # In float32 the figures hold the cache's error and not bfloat16's.
    server_flags = ["--", *device_flags(), "--dtype", "float32"]
    best = str(options.out / "best.yaml")
    for command in (
        ["search", *common, "--max-bits", "4", "--trials", str(options.trials), *server_flags],
        ["evaluate", *common, "--recall", str(options.recall), "--configs", *COMPARED, best, *server_flags],
    ):
        print("$ sglang kvtuner", " ".join(command), flush=True)
        tuner = [sys.executable, "-m", "sglang.srt.kvtuner.tuner", *command]
        status = subprocess.run(tuner, env=server_environment(device_flags()), check=False).returncode
        if status:
            return status
    print(verdict(json.loads((options.out / "evaluation.json").read_text(encoding="utf-8")), best))
    print(f"took {(time.monotonic() - began) / 60:.1f} minutes; tables, plots and presets are in {options.out}")
    return 0


def verdict(rows, best):
    """A line per uniform K4V4 row of evaluation.json: how the preset's KL compares."""
    by_name = {row["configuration"]: row for row in rows}
    tuned = by_name[best]
    lines = []
    for name in ("K4V4", DEFAULTS):
        uniform = by_name[name]
        lines.append(
            f"{tuned['nominal_bits']:.2f} nominal and {tuned['stored_bits']:.2f} stored bits have "
            f"{tuned['kl'] / uniform['kl']:.2f} of the KL of uniform {name} ({uniform['stored_bits']:.2f} stored bits)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
