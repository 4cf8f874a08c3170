"""Two machines on one: Linux network namespaces with a virtual cable between them.

Each namespace has its own loopback interface, ports and address, so what runs in one reaches the other only through
the cable. Nothing leaves them. Needs root and `ip` of iproute2.
"""

import ctypes
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.60.252.76", "10.60.61.227")
PREFIX_LENGTH = 16
# Both ends may have one name: each is in a namespace of its own.
INTERFACE = "eth0"

# A namespace shares everything but the network with its neighbours. Ranks on two nodes that see one /dev/shm take
# each other's shared memory for their own and wait forever, so each node gets one that nobody else sees.
_PRIVATE_SHM = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(RuntimeError):
    """Network namespaces cannot be used here; the message says why."""


@dataclass(frozen=True)
class Namespace:
    """One of the two: its name for `ip netns`, the address of its end of the cable, the name of that interface."""

    name: str
    address: str
    interface: str = INTERFACE

    def command(self, command):
        """``command`` as it is run in this namespace, with a /dev/shm of its own.

        Every program on the way is replaced by the next, so the process started is the command's own.
        """
        return ["ip", "netns", "exec", self.name, "sh", "-c", _PRIVATE_SHM, "sh", *map(str, command)]

    def pids(self):
        """Processes that run in this namespace, however they came there."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    @contextmanager
    def entered(self):
        """Sockets that the calling thread opens inside the block belong to this namespace."""
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            inside = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
            try:
                _set_namespace(inside)
            finally:
                os.close(inside)
            try:
                yield
            finally:
                _set_namespace(outside)
        finally:
            os.close(outside)


@contextmanager
def joined_pair():
    """Two namespaces that reach each other at ``ADDRESSES``; removed when the block ends, however it ends.

    Their names carry this process's id, so that runs side by side do not meet.

    Raises:
        NamespaceError: there is no `ip`, or it is not allowed to make them.
    """
    if shutil.which("ip") is None:
        raise NamespaceError("`ip` is not installed (package iproute2)")
    pair = tuple(Namespace(f"sglang-{os.getpid()}-node{number}", address) for number, address in enumerate(ADDRESSES))
    made = []
    try:
        for namespace in pair:
            _ip("netns", "add", namespace.name)
            made.append(namespace)
        here, there = (namespace.name for namespace in pair)
        _ip("link", "add", INTERFACE, "netns", here, "type", "veth", "peer", "name", INTERFACE, "netns", there)
        for namespace in pair:
            _ip("-n", namespace.name, "link", "set", "lo", "up")
            _ip("-n", namespace.name, "address", "add", f"{namespace.address}/{PREFIX_LENGTH}", "dev", INTERFACE)
            _ip("-n", namespace.name, "link", "set", INTERFACE, "up")
        yield pair
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "delete", namespace.name], capture_output=True, check=False)


def why_unusable():
    """Why namespaces cannot be used here, or None where they can; found out by making a pair."""
    try:
        with joined_pair() as pair:
            _run(pair[0].command(["true"]))
            with pair[0].entered():
                pass
    except (NamespaceError, OSError) as error:
        return f"two network namespaces cannot be made here: {error}"
    return None


def _ip(*arguments):
    _run(["ip", *arguments])


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NamespaceError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")


def _set_namespace(descriptor):
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
