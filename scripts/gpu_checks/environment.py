"""What the checks ran on, for the JSON."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from typing import Any

import torch
import triton

from gpu_checks import sources
from gpu_checks.device import Device


def describe(device: Device) -> dict[str, Any]:
    """Date, device, driver, versions, and a digest of the sources; None for what is not on this machine."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device.describe(),
        "small": device.small,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _output("nvcc", "--version"),
        "compute_sanitizer": shutil.which("compute-sanitizer") is not None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "triton": triton.__version__,
        "system": platform.platform(),
        "sources_sha256": sources.digest(),
    }


def line(found: dict[str, Any]) -> str:
    """The most of it in a line."""
    device = found["device"]
    words = [device["name"]]
    if "capability" in device:
        words += [f"sm_{device['capability'].replace('.', '')}", f"driver {found['driver']}"]
    words += [f"torch {found['torch']}", f"triton {found['triton']}", f"sources {found['sources_sha256'][:12]}"]
    return ", ".join(words)


def _output(*command: str) -> str | None:
    """Last line that a tool prints, None where there is none or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[-1].strip() if done.returncode == 0 and lines else None
