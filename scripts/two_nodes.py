#!/usr/bin/env python3
"""Serve one model over two nodes, tensor parallel, on a single machine without GPUs.

The nodes are two network namespaces joined by a virtual cable (see netns.py), so this needs root and `ip` of iproute2.
It prints the two commands as they are typed on two machines, asks a question over node 0's HTTP port, and shows the
cache format of the quantized KV cache that all ranks agreed on. Exits with 0 only if the answer came. docs/two_nodes.md has
the same for two machines with GPUs.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import make_random_llama
import netns
from launcher import ROOT, Server, ServerError
from machine import device_flags

PORT = 30000
INIT_PORT = 29500
DEFAULT_MODEL = ROOT / ".cache" / "models" / "random-llama"

# The ranks of both nodes share this machine's memory and cores: a small pool, and no spinning while idle.
SHARED_MACHINE = ["--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "8", "--sleep-on-idle"]
QUANTIZED = ["--enable-kvtuner-quant", "--kvtuner-nbits-key", "4", "--kvtuner-nbits-value", "4"]


class Node(Server):
    """One node's server, inside a namespace; requests to it are sent from inside too.

    Args:
        rank: the node's rank.
        namespace: where it runs.
        model, flags, log_path: see :class:`launcher.Server`.
        local_ranks: tensor-parallel ranks on this node.
        env: further environment variables.
    """

    def __init__(self, rank, namespace, model, flags, *, log_path, local_ranks, env=None):
        cores = sorted(os.sched_getaffinity(0))
        first = rank * local_ranks
        ours = {
            # Ranks of two nodes on one machine may well outnumber its cores: they share them out in turn.
            "OMP_NUM_THREADS": 1,
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(
                str(cores[(first + local) % len(cores)]) for local in range(local_ranks)
            ),
            # A namespace has no name service and no default route, from which these would be guessed.
            "GLOO_SOCKET_IFNAME": namespace.interface,
            "SGLANG_HOST_IP": namespace.address,
        }
        flags = [*device_flags(), *flags]
        super().__init__(model, flags, log_path=log_path, port=PORT, ranks=local_ranks, env={**ours, **(env or {})})
        self.rank = rank
        self.namespace = namespace
        self.typed = ["python", *self.command[1:]]
        self.command = namespace.command(self.command)

    def is_healthy(self):
        """Whether /health answers with success now."""
        with self.namespace.entered():
            return super().is_healthy()

    def request(self, path, payload=None, timeout=600.0):
        """As :meth:`launcher.Server.request`, from inside the namespace."""
        with self.namespace.entered():
            return super().request(path, payload, timeout)

    def stop(self, grace=0.0):
        """As :meth:`launcher.Server.stop`; also ends what left the server's session, which stays in the namespace."""
        super().stop(grace)
        for pid in self.namespace.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def exit_status(self):
        """The exit status of the server's main process, negative for a signal, or None while it runs."""
        return self._process.poll()


class TwoNodes:
    """A server over two namespaces; use it as a context manager, which starts both nodes and removes everything.

    Args:
        model: checkpoint folder.
        flags: flags of both nodes; those that say which node is which are added.
        folder: gets the logs, node0.log and node1.log.
        tp_size: tensor-parallel ranks, half of them on each node.
        flags_of_node_1, model_of_node_1: those of node 1, where they are not those of node 0.
        env: further environment variables of both. env_of_node_1: of node 1, beside them.
    """

    def __init__(
        self,
        model,
        flags,
        *,
        folder,
        tp_size=4,
        flags_of_node_1=None,
        model_of_node_1=None,
        env=None,
        env_of_node_1=None,
    ):
        self._models = (model, model if model_of_node_1 is None else model_of_node_1)
        self._flags = (flags, flags if flags_of_node_1 is None else flags_of_node_1)
        self._folder = Path(folder)
        self._tp_size = tp_size
        self._env = (env or {}, {**(env or {}), **(env_of_node_1 or {})})
        self._cleanup = ExitStack()
        self.nodes = ()

    def __enter__(self):
        with self._cleanup:
            pair = self._cleanup.enter_context(netns.joined_pair())
            self.nodes = tuple(self._node(rank, namespace, pair[0].address) for rank, namespace in enumerate(pair))
            for node in self.nodes:
                self._cleanup.callback(node.stop)
                node.start()
            # Nothing failed: what was entered stays until __exit__.
            self._cleanup = self._cleanup.pop_all()
        return self

    def __exit__(self, *unused):
        self._cleanup.close()

    def _node(self, rank, namespace, init_address):
        flags = ["--tp-size", self._tp_size, "--nnodes", 2, "--node-rank", rank]
        flags += ["--dist-init-addr", f"{init_address}:{INIT_PORT}", *self._flags[rank]]
        log_path = self._folder / f"node{rank}.log"
        return Node(
            rank,
            namespace,
            self._models[rank],
            flags,
            log_path=log_path,
            local_ranks=self._tp_size // 2,
            env=self._env[rank],
        )

    def wait_until_healthy(self, timeout=600.0, progress=None):
        """Wait for node 0's /health.

        Raises:
            ServerError: one of the nodes ended, or the time is over.
        """
        first, second = self.nodes

        def watch(seconds):
            if not second.alive():
                raise second.error(f"node 1 ended with exit status {second.exit_status()}")
            if progress is not None:
                progress(seconds)

        first.wait_until_healthy(timeout, watch)
        return self


def wait_until_ended(nodes, timeout):
    """Wait until nothing of the nodes runs any more, and return how many seconds that took.

    Raises:
        ServerError: something still runs after ``timeout`` seconds; the message names it.
    """
    began = time.monotonic()
    while True:
        left = {node: node.namespace.pids() for node in nodes if node.alive() or node.namespace.pids()}
        waited = time.monotonic() - began
        if not left:
            return waited
        if waited > timeout:
            pids = "; ".join(f"of node {node.rank} processes {', '.join(map(str, left[node]))}" for node in left)
            raise nodes[0].error(f"still running {timeout:.0f} s later: {pids}")
        time.sleep(0.2)


def main(arguments=None):
    """Command line entry; returns the exit status."""
    options = _options(arguments)
    # A terminated demo must end its servers as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="two-nodes") as folder:
            _run(options, Path(folder))
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (netns.NamespaceError, ServerError, OSError) as error:
        print(f"\ntwo_nodes: {error}", file=sys.stderr)
        return 1


def _options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        help="checkpoint folder (default: a small Llama with random weights, made on first use; it answers nonsense)",
    )
    parser.add_argument("--tp-size", type=int, choices=(2, 4), default=4, help="ranks, half on each node (default: 4)")
    parser.add_argument("--serve", action="store_true", help="keep serving until Ctrl-C")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further server flags; must come last")
    return parser.parse_args(arguments)


def _run(options, folder):
    model = options.model or make_random_llama.make(DEFAULT_MODEL)
    flags = [*QUANTIZED, *SHARED_MACHINE, *options.flags]
    began = time.monotonic()
    with TwoNodes(model, flags, folder=folder, tp_size=options.tp_size) as server:
        for node in server.nodes:
            print(f"node {node.rank}, {node.namespace.address}$ {shlex.join(node.typed)}", flush=True)
        server.wait_until_healthy(progress=_progress)
        print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
        first = server.nodes[0]
        for line in first.log_text().splitlines():
            if "TP0] Quantized KV cache" in line:
                print(line)
        payload = {"text": "What is the capital of France?", "sampling_params": {"temperature": 0}}
        print(f"\nPOST /generate {json.dumps(payload)}")
        print(json.dumps(first.request("/generate", payload)["text"]), flush=True)
        if options.serve:
            _keep_serving(server)


def _keep_serving(server):
    url = f"http://127.0.0.1:{PORT}/generate"
    name = server.nodes[0].namespace.name
    print(f"\nserving until Ctrl-C; from another shell:\n  ip netns exec {name} curl {url} ...")
    print("logs: " + ", ".join(str(node.log_path) for node in server.nodes), flush=True)
    while all(node.alive() for node in server.nodes):
        time.sleep(0.5)
    ended = next(node for node in server.nodes if not node.alive())
    raise ended.error(f"node {ended.rank} ended by itself with exit status {ended.exit_status()}")


def _progress(seconds):
    if int(seconds) % 15 == 0:
        print(f"waiting for both nodes: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
