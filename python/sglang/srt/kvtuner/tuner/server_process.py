"""Start an sglang server as a subprocess, wait until it answers, read its log, end its whole process tree.

The tuner, the demos, the benchmark and the tests share this. A server runs in a session of its own with a log file and
a temporary folder of its own; only its own processes are ever ended. Traffic stays on the loopback interface. Nothing of
the package is imported, so that scripts may load this file alone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"

_PR_SET_PDEATHSIG = 1


class ServerError(RuntimeError):
    """A server did not start, died, or answered with an error; the message ends with its last log lines."""


def server_environment(
    flags: Sequence[str] = (), ranks: int = 1, extra: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The environment of a server: this process's, with what a local model and a server on the CPU need.

    flags: the server's command line flags; ``--device cpu`` among them asks for what the CPU engine needs. ranks:
    tensor-parallel ranks on this machine; more than there are cores get one thread each. extra: variables that win over
    everything else; None as a value removes a variable.
    """
    environment = dict(os.environ)
    # ninja, which builds kernels at run time, is found through PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if _device(flags) == "cpu":
        environment.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        # A failing server otherwise waits a minute for core dumps of GPUs that are not there.
        environment.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
        cores = sorted(os.sched_getaffinity(0))
        if ranks > 1:
            # Ranks that wait for each other on too few cores mostly spin; a core each, in turn, is the least bad.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(cores) // ranks)))
            bind = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", bind)
            # A host name that resolves to the wrong interface otherwise stops the ranks from meeting.
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name, value in (extra or {}).items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = str(value)
    return environment


def _device(flags: Sequence[str]) -> str | None:
    """The device that a command line asks for; of several the last, as the server has it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", nargs="?")
    return parser.parse_known_args(flags)[0].device


def free_port() -> int:
    """A TCP port that nothing on the loopback interface listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Server:
    """One server process and its tree; use it as a context manager.

    model: checkpoint folder or Hugging Face name. flags: further command line flags, ``--device`` among them. log_path:
    file that gets what the server prints. port: to listen on; a free one where None. ranks, env: see
    :func:`server_environment`.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        flags: Iterable[object] = (),
        *,
        log_path: str | os.PathLike,
        port: int | None = None,
        ranks: int = 1,
        env: Mapping[str, Any] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log_path = Path(log_path)
        arguments = [str(flag) for flag in flags]
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        self.command += ["--host", HOST, "--port", str(self.port), *arguments]
        self._environment = server_environment(arguments, ranks, env)
        self._process: subprocess.Popen | None = None
        self._temporary = ""

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def start(self) -> Server:
        """Start the process and return at once."""
        # Upstream leaves sockets and files in the temporary folder. The name is short: socket paths have a limit.
        self._temporary = tempfile.mkdtemp(prefix="sgl")
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._environment, "TMPDIR": self._temporary},
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        return self

    def wait_until_healthy(self, timeout: float = 600.0, progress: Callable[[float], object] | None = None) -> Server:
        """Wait for /health, calling ``progress(seconds)`` about once a second.

        Raises ServerError where the process ended, which is noticed at once, or after ``timeout`` seconds.
        """
        begin = time.monotonic()
        tick = 0
        while True:
            waited = time.monotonic() - begin
            if not self.alive():
                raise self.error(f"the server ended with {self._how_it_ended()} after {waited:.0f} s")
            if self.is_healthy():
                return self
            if waited > timeout:
                raise self.error(f"the server did not answer within {timeout:.0f} s")
            if progress is not None and waited >= tick:
                progress(waited)
                tick += 1
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        """Whether /health answers with success now."""
        try:
            with _open(f"{self.url}/health", timeout=30) as answer:
                return answer.status == 200
        except OSError:
            return False

    def alive(self) -> bool:
        """Whether the server's main process runs."""
        return self._process is not None and self._process.poll() is None

    def request(self, path: str, payload: Any = None, timeout: float = 600.0) -> Any:
        """GET ``path``, or POST ``payload`` to it as JSON, and return the decoded answer.

        Raises ServerError where no whole answer comes within ``timeout`` seconds, or an HTTP status that is no success.
        """
        data = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _open(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            raise self.error(f"{path} answered with HTTP status {error.code}: {body}") from error
        except (OSError, http.client.HTTPException) as error:
            raise self.error(f"{path} got no answer: {error}") from error

    def log_text(self) -> str:
        """What the server has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def error(self, message: str, lines: int = 30) -> ServerError:
        """A :class:`ServerError` with the message and the last lines of the log."""
        tail = "\n".join(self.log_text().splitlines()[-lines:])
        return ServerError(f"{message}\n--- last lines of {self.log_path} ---\n{tail}")

    def stop(self, grace: float = 0.0) -> None:
        """End every process of the server; without effect where it never started or is stopped already.

        grace: seconds that the server gets to drain requests and end by itself (upstream needs about ten).
        """
        if self._process is None:
            return
        if grace and self.alive():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        _end(_session_members(self._process.pid))
        self._process.wait()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _how_it_ended(self) -> str:
        status = self._process.returncode if self._process else None
        return f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"


def _session_members(session: int) -> list[psutil.Process]:
    """Running processes of a session, by the id of the process that opened it."""
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return members


def _end(processes: list[psutil.Process]) -> None:
    """Kill processes; Python's resource trackers last, for they then remove what the others left in shared memory."""
    trackers = [process for process in processes if _is_tracker(process)]
    workers = [process for process in processes if process not in trackers]
    for group, patience in ((workers, 0.0), (trackers, 3.0)):
        if patience:
            _, group = psutil.wait_procs(group, timeout=patience)
        for process in group:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(group, timeout=10.0)


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _end_with_parent() -> Callable[[], object] | None:
    """What the child runs so that a caller that is killed itself does not leave its server behind (Linux).

    Looked up before the fork: after it, another thread's lock on the loader would never be released.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl and functools.partial(prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)


def _open(request: str | urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    # Loopback traffic never goes through a proxy that the environment may name.
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)
