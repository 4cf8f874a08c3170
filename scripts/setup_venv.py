#!/usr/bin/env python3
"""Make or bring up to date a virtual environment with this fork of sglang and its dependencies.

The first run installs the whole closure of dependencies (about 11 GB). Later runs compare content: nothing changed,
nothing is done; only files of this repository changed, only their wheels are installed again; the pinned upstream
release changed, everything is resolved again.

On a machine without an NVIDIA GPU the portable CPU build of sgl_kernel is installed; with one, the published build.
pip's output goes to a log file, whose end is shown on failure. Needs only the standard library.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from machine import has_cuda

ROOT = Path(__file__).resolve().parent.parent
KERNEL = ROOT / "sgl-kernel" / "portable"

# Dependencies come from these: what the pinned release asks for, and what the kernel package does.
CLOSURE_INPUTS = ("python/upstream/pin.toml", "pyproject.toml", "sgl-kernel/portable/pyproject.toml")
# What the wheels are made from, beside the above.
FORK_INPUTS = ("pyproject.toml", "python", "sgl-kernel/include", "sgl-kernel/csrc")
KERNEL_INPUTS = ("sgl-kernel/portable",)

# For the tests, for the tuner, which upstream's dependencies do not cover, and for `make lint`, whose verdicts change
# with the release.
TOOLS = ("pytest", "optuna", "matplotlib", "ruff==0.17.6", "mypy==2.4.1", "clang-format==23.1.5")


class SetupError(RuntimeError):
    """A step failed; the message ends with the end of its log."""


def set_up(venv, log_path):
    """Bring the environment ``venv`` up to date; the log of what pip prints goes to ``log_path``."""
    kernel = [] if has_cuda() else [str(KERNEL)]
    wanted = {
        "closure": digest(CLOSURE_INPUTS) + (" cpu" if kernel else " cuda"),
        "fork": digest(FORK_INPUTS),
        "kernel": digest(KERNEL_INPUTS) if kernel else "published",
        "tools": " ".join(TOOLS),
    }
    stamp = venv / "installed.json"
    have = _read(stamp)
    if have == wanted:
        return
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.write_bytes(b"")
    python = venv / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    install = [*pip, "install", "--progress-bar", "off"]
    # Without a stamp an interrupted run starts over.
    stamp.unlink(missing_ok=True)
    # setuptools would put files that are gone by now into the wheel from here.
    shutil.rmtree(KERNEL / "build", ignore_errors=True)
    if have.get("closure") != wanted["closure"]:
        if not python.exists():
            _step("making the environment", [sys.executable, "-m", "venv", str(venv)], log_path)
            _step("updating pip", [*install, "--upgrade", "pip"], log_path)
        # One call, so that one resolution serves both and the kernel package satisfies the fork's pin.
        what = "installing sglang and its dependencies (11 GB, minutes)"
        _step(what, [*install, *kernel, str(ROOT), *TOOLS], log_path)
    else:
        # pip does nothing where the version is the same: sgl_kernel's stays, and sglang's where only its build changed.
        again = [*install, "--no-deps", "--force-reinstall"]
        if have.get("tools") != wanted["tools"]:
            _step("installing tools", [*install, *TOOLS], log_path)
        if kernel and have.get("kernel") != wanted["kernel"]:
            _step("installing sgl_kernel", [*again, *kernel], log_path)
        if have.get("fork") != wanted["fork"]:
            _step("installing this repository's sglang", [*again, str(ROOT)], log_path)
    stamp.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def digest(inputs):
    """A hash of the content of files and folders, by path; what does not exist counts as empty."""
    total = hashlib.sha256()
    for name in inputs:
        path = ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and not _is_leftover(file.relative_to(ROOT)):
                total.update(f"{file.relative_to(ROOT)}\0".encode())
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _is_leftover(path):
    return path.suffix == ".pyc" or any(part.endswith(".egg-info") or part == "build" for part in path.parts)


def _read(stamp):
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _step(what, command, log_path):
    """Run a command with its output in the log, and a line now and then."""
    began = time.monotonic()
    print(f"{what} ...", flush=True)
    with open(log_path, "ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    status = process.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    print(f"... {time.monotonic() - began:.0f} s", flush=True)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if status:
        tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-60:])
        raise SetupError(f"{what} failed with exit status {status}\n--- end of {log_path} ---\n{tail}")


def main(arguments=None):
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder (default: %(default)s)")
    log_path = ROOT / ".cache" / "logs" / "setup.log"
    parser.add_argument("--log", type=Path, default=log_path, help="pip's output (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        set_up(options.venv.absolute(), options.log)
    except KeyboardInterrupt:
        return 130
    except (OSError, SetupError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
