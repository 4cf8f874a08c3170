"""Runs a program: a register is an array over the threads of a block.

The threads at the lowest instruction go first, so that branches join again. An instruction of a warp whose lanes are not all
there is an error. Accesses are checked against the buffers that were handed over. cp.async lands at its wait.
"""

import re

import numpy as np

from harness.device.ptx.instructions import INSTRUCTIONS
from harness.device.ptx.values import from_raw, to_raw

LANES = 32
UNDEFINED = 0xDEAD_BEEF_DEAD_BEEF  # whoever uses it is seen in the result


class PtxError(RuntimeError):
    """The program did what a GPU would not forgive."""


class Memory:
    """Buffers at the addresses that they have, copied into one array. buffers: (address, bytes, writable) each."""

    def __init__(self, buffers):
        self._buffers = sorted(buffers, key=lambda buffer: buffer[0])
        self._starts = np.array([address for address, _, _ in self._buffers], np.int64)
        sizes = np.array([len(data) for _, data, _ in self._buffers], np.int64)
        self._ends = self._starts + sizes
        self._offsets = np.concatenate([[0], np.cumsum(-(-sizes // 16) * 16)])[:-1]
        self._writable = np.array([writable for _, _, writable in self._buffers])
        self.bytes = np.zeros(int((-(-sizes // 16) * 16).sum()), np.uint8)
        for offset, (_, data, _) in zip(self._offsets, self._buffers, strict=True):
            self.bytes[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def find(self, addresses, size, write):
        """Indices into ``bytes``."""
        at = np.searchsorted(self._starts, addresses, "right") - 1
        if (at < 0).any() or (addresses + size > self._ends[at]).any():
            raise PtxError(f"{'write' if write else 'read'} of {size} bytes in no buffer")
        if write and not self._writable[at].all():
            raise PtxError("write to a buffer that is only read")
        return addresses - self._starts[at] + self._offsets[at]

    def written(self):
        """Address and content of the buffers that may have changed."""
        for offset, (address, data, writable) in zip(self._offsets, self._buffers, strict=True):
            if writable:
                yield address, self.bytes[offset : offset + len(data)]


class Block:
    """The threads of one block while they run."""

    def __init__(self, program, memory, arguments, threads, shared_bytes, index):
        self.program, self.memory, self.arguments, self.count = program, memory, arguments, threads
        self.shared = np.full(-(-shared_bytes // 16) * 16, 0xFF, np.uint8)
        self.registers = {}
        self.special = {"%tid.x": np.arange(threads, dtype=np.uint64)}
        for axis, value in zip("xyz", index, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(threads, value, np.uint64)
        self.open, self.groups = [], [[] for _ in range(threads)]  # copies; committed groups of each thread
        self.lane_groups = np.arange(threads) // LANES

    def run(self):
        instructions = self.program.instructions
        self.pc, self.waiting = np.zeros(self.count, np.int64), np.full(self.count, -1)
        while True:
            ready = (self.pc < len(instructions)) & (self.waiting < 0)
            if not ready.any():
                if not (self.waiting >= 0).any():
                    return
                if (self.waiting < 0).any() or (self.waiting != self.waiting[0]).any():
                    raise PtxError("threads at different barriers, or ended before one")
                self.waiting[:] = -1
                continue
            here = self.pc[ready].min()
            self.active = ready & (self.pc == here)
            self.pc[self.active] += 1
            instruction = instructions[here]
            if instruction.guard:
                name, negated = instruction.guard
                self.active &= self.registers[name].astype(bool) != negated
                if not self.active.any():
                    continue
            self.here = here
            INSTRUCTIONS[instruction.op[0]](self, instruction)

    # ---- operands ----
    def raw(self, name):
        """A register, constant or symbol as uint64."""
        if name in self.registers:
            return self.registers[name]
        if name in self.special:
            return self.special[name]
        if name in self.program.parameters:
            return np.full(self.count, self.program.parameters[name], np.uint64)
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", name):
            return np.full(self.count, int(name[2:], 16), np.uint64)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", name):
            return np.full(self.count, int(name.rstrip("U"), 0) & (1 << 64) - 1, np.uint64)
        if "shared" in name:  # dynamic shared memory begins at 0
            return np.zeros(self.count, np.uint64)
        if name[0] == "%":  # compilers leave halves of words undefined that nobody uses
            return np.full(self.count, UNDEFINED, np.uint64)
        raise PtxError(f"unknown operand {name}")

    def get(self, name, kind):
        return from_raw(self.raw(name), kind)

    def set(self, name, values, kind):
        if name == "_":
            return
        register = self.registers.setdefault(name, np.zeros(self.count, np.uint64))
        register[self.active] = to_raw(values, kind)[self.active]

    def address(self, text):
        base, _, offset = text.strip("[] ").partition("+")
        return self.raw(base.strip()).astype(np.int64) + int(offset or 0)

    def whole_warps(self, instruction):
        warps = self.active.reshape(-1, LANES)
        if (warps.any(1) != warps.all(1)).any():
            raise PtxError(f"without all lanes of a warp: {instruction.text}")

    # ---- memory ----
    def _place(self, space, addresses, size, write):
        if (addresses % size).any():
            raise PtxError(f"{space} access of {size} bytes is not aligned")
        if space == "global":
            return self.memory.bytes, self.memory.find(addresses, size, write)
        if (addresses < 0).any() or (addresses + size > len(self.shared)).any():
            raise PtxError(f"shared access of {size} bytes outside of shared memory")
        return self.shared, addresses

    def load(self, space, addresses, size, active=None):
        """uint64 for the active threads, 0 for the others."""
        active = self.active if active is None else active
        found = np.zeros(self.count, np.uint64)
        data, at = self._place(space, addresses[active], size, False)
        found[active] = data.view(f"u{size}")[at // size]
        return found

    def store(self, space, addresses, size, values, active=None):
        active = self.active if active is None else active
        data, at = self._place(space, addresses[active], size, True)
        data.view(f"u{size}")[at // size] = values[active].astype(f"u{size}")

    def land_copies(self, keep):
        for thread in np.flatnonzero(self.active):
            while len(self.groups[thread]) > keep:
                for to, source in self.groups[thread].pop(0):
                    at = self.memory.find(np.array([source]), 16, False)[0]
                    self.shared[to : to + 16] = self.memory.bytes[at : at + 16]


def run_grid(program, memory, arguments, grid, threads, shared_bytes):
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                Block(program, memory, arguments, threads, shared_bytes, (x, y, z)).run()
