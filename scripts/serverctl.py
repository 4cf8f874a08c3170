"""Start an sglang server as a subprocess, wait until it answers, read its log, end its whole process tree.

The demo and the tests share this. A server runs in a session of its own with a log file and a temporary folder of its
own; only its own processes are ever ended. Traffic stays on the loopback interface.
"""

import contextlib
import ctypes
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
from pathlib import Path

import psutil

from machine import has_cuda

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1

# Loopback traffic never goes through a proxy that the environment may name.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """A server did not start, died, or answered with an error; the message ends with its last log lines."""


def device_flags():
    """Flags that choose the device: the CPU where there is no GPU."""
    return [] if has_cuda() else ["--device", "cpu"]


def server_environment(ranks=1, extra=None):
    """The environment of a server: this process's, with what a local model and a machine without a GPU need.

    Args:
        ranks: tensor-parallel ranks on this machine; more than there are cores get one thread each.
        extra: variables that win over everything else; None as a value removes a variable.
    """
    environment = dict(os.environ)
    # ninja, which builds kernels at run time, is found through PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    # The default is in the temporary folder, which here goes with the server.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "torchinductor"))
    if not has_cuda():
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


def free_port():
    """A TCP port that nothing on the loopback interface listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Server:
    """One server process and its tree; use it as a context manager.

    Args:
        model: checkpoint folder.
        flags: further command line flags.
        log_path: file that gets what the server prints.
        port: port to listen on; a free one where None.
        ranks, env: see :func:`server_environment`.
    """

    def __init__(self, model, flags=(), *, log_path, port=None, ranks=1, env=None):
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log_path = Path(log_path)
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        self.command += ["--host", HOST, "--port", str(self.port), *device_flags(), *map(str, flags)]
        self._environment = server_environment(ranks, env)
        self._process = None
        self._temporary = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *unused):
        self.stop()

    def start(self):
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
                preexec_fn=_end_with_parent,
            )
        return self

    def wait_until_healthy(self, timeout=600.0, progress=None):
        """Wait for /health, calling ``progress(seconds)`` about once a second.

        Raises:
            ServerError: the process ended, which is noticed at once, or the time is over.
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

    def is_healthy(self):
        """Whether /health answers with success now."""
        try:
            with _opener.open(f"{self.url}/health", timeout=30) as answer:
                return answer.status == 200
        except OSError:
            return False

    def alive(self):
        """Whether the server's main process runs."""
        return self._process is not None and self._process.poll() is None

    def request(self, path, payload=None, timeout=600.0):
        """GET ``path``, or POST ``payload`` to it as JSON, and return the decoded answer.

        Raises:
            ServerError: no answer, or an HTTP status that is not a success.
        """
        data = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _opener.open(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            raise self.error(f"{path} answered with HTTP status {error.code}: {body}") from error
        except OSError as error:
            raise self.error(f"{path} got no answer: {error}") from error

    def log_text(self):
        """What the server has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def error(self, message, lines=30):
        """A :class:`ServerError` with the message and the last lines of the log."""
        tail = "\n".join(self.log_text().splitlines()[-lines:])
        return ServerError(f"{message}\n--- last lines of {self.log_path} ---\n{tail}")

    def stop(self, grace=0.0):
        """End every process of the server; without effect where it never started or is stopped already.

        Args:
            grace: seconds that the server gets to drain requests and end by itself (upstream needs about ten).
        """
        if self._process is None:
            return
        if grace and self.alive():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        _end(self._members())
        self._process.wait()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _members(self):
        """Running processes of the session that :meth:`start` opened."""
        members = []
        for process in psutil.process_iter(["status"]):
            try:
                if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == self._process.pid:
                    members.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        return members

    def _how_it_ended(self):
        status = self._process.returncode if self._process else None
        return f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"


def _end(processes):
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


def _is_tracker(process):
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _end_with_parent():
    """Runs in the child: a caller that is killed itself does not leave its server behind (Linux)."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
