"""Check 10: NVIDIA's compute-sanitizer over packing, attention and graphs, on small shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_checks.device import Device
from gpu_checks.report import Findings, NotRun

TOOLS = ("memcheck", "racecheck")
CHECKS = ("pack", "attend", "graphs")
ERRORS = 86  # the status that the tool is told to end with
LIMIT_SECONDS = 3600
_PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def check(device: Device, findings: Findings) -> str:
    """Each check in a process of its own below each tool."""
    found = shutil.which("compute-sanitizer") or next((place for place in _PLACES if Path(place).is_file()), None)
    if found is None:
        raise NotRun("compute-sanitizer is not on this machine (it comes with the CUDA toolkit)")
    for tool in TOOLS:
        for name in CHECKS:
            status, output = _run([found, "--tool", tool, "--error-exitcode", str(ERRORS)], name)
            findings.record("runs", {"tool": tool, "check": name, "status": status, "output": output[-4000:]})
            what = "found errors" if status == ERRORS else f"ended with status {status}"
            errors = [line for line in output.splitlines() if "=====" in line and "Error" in line]
            findings.expect(
                status == 0, f"{tool} of {name} {what}: {(errors or output.splitlines() or [''])[-1].strip()}"
            )
    return f"{', '.join(TOOLS)} of {', '.join(CHECKS)}: no errors"


def _run(tool: list[str], name: str) -> tuple[int, str]:
    program = Path(sys.argv[0]).resolve()
    environment = dict(os.environ)
    if name != "graphs":
        # Each tensor in an allocation of its own, so that one byte behind it is an error. Captures need torch's allocator.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [*tool, sys.executable, str(program), "--in-process", "--small", "--only", name]
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired as e:
        return 124, str(e)
    return done.returncode, done.stdout
