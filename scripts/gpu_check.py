#!/usr/bin/env python3
"""Checks that this card runs the quantized cache's kernels right: ten checks, a line each, raw numbers with --json.

    python scripts/gpu_check.py --json found.json    # on a machine with a GPU; needs torch and triton, not sglang
    python scripts/gpu_check.py --interpret          # no GPU: a small mode in Triton's interpreter

Exit status: 0 all passed; 1 one failed; 3 none failed, but some could not run here, and their lines say why. docs/gpu_checks.md
says what each check sees.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_checks import report, sources

NAMES = ("compile", "pack", "attend", "pools", "graphs", "fence", "slots", "prefill", "bandwidth", "sanitizer")
# Of one check. The sanitizer's children have limits of their own.
LIMIT_SECONDS = 6 * 3600


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Checks that this card runs the quantized cache's kernels right.")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="CHECK", help=", ".join(NAMES))
    parser.add_argument("--interpret", action="store_true", help="without a GPU: small shapes in Triton's interpreter")
    parser.add_argument("--small", action="store_true", help="small shapes on the GPU")
    parser.add_argument(
        "--upstream",
        metavar="DIR",
        help="a folder with an unpacked sglang, for its extend kernel; default: an installed one",
    )
    parser.add_argument("--json", metavar="FILE", help="write device, versions and raw numbers there")
    parser.add_argument(
        "--in-process", action="store_true", help="all checks in this process; a kernel that crashes takes them along"
    )
    options = parser.parse_args(arguments)
    if not options.interpret and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the kernels would not run on the GPU; unset it, or give --interpret")
    try:
        options.upstream = sources.find_upstream(options.upstream)
    except ValueError as e:
        parser.error(str(e))
    return options


def prepare(options: argparse.Namespace) -> Any:
    """Make the sources importable; returns the device. Raises ImportError without torch or triton, RuntimeError without a GPU."""
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    sources.install(options.upstream)
    from gpu_checks.device import Gpu, Interpreter

    return Interpreter() if options.interpret else Gpu(options.small)


def run_alone(name: str, options: argparse.Namespace) -> report.Result:
    """A check in a process of its own: after an illegal access the device answers nothing in the process that did it."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--in-process", "--only", name, "--json", str(found)]
        command += ["--small"] * options.small + ["--interpret"] * options.interpret
        command += ["--upstream", str(options.upstream)] if options.upstream else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return report.Result(name, report.FAIL, f"not done after {LIMIT_SECONDS} s", LIMIT_SECONDS)
        if not found.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            numbers = {"status": done.returncode, "stderr": done.stderr[-4000:]}
            return report.Result(name, report.FAIL, f"its process ended with {done.returncode}: {last}", 0.0, numbers)
        return report.Result(**json.loads(found.read_text(encoding="utf-8"))["checks"][0])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        device = prepare(options)
    except (ImportError, RuntimeError) as e:
        print(f"{report.NOT_RUN}: {e}; --interpret runs a small mode without a GPU", file=sys.stderr)
        return report.INCOMPLETE
    from gpu_checks import environment, registry

    about = environment.describe(device)
    print(environment.line(about), flush=True)
    alone = device.gpu and not options.in_process
    results = []
    for check in registry.CHECKS:
        if check.name in options.only:
            results.append(run_alone(check.name, options) if alone else check.run(device))
            print(results[-1].line(), flush=True)
    if options.json:
        found = {"environment": about, "checks": [dataclasses.asdict(result) for result in results]}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return report.exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
