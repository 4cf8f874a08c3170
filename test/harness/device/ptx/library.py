"""The PTX machine in place of the host machine's library (build.py), so that the same steps run on both."""

import ctypes

from harness.device.nvidia import ptx_of
from harness.device.ptx.machine import Memory, PtxError, run_grid
from harness.device.ptx.program import parse


class PtxLibrary:
    """The kernels of a layer as nvcc compiles them. host: the host machine's library of the layer, which knows launch shapes."""

    def __init__(self, layer, bf16, host, kernels=None):
        text = ptx_of(layer, bf16, **({"kernels": kernels} if kernels else {}))
        self._decode, self._merge = (parse(text, name) for name in ("decode_kernel", "merge_kernel"))
        self._stores = [parse(text, f"store_kernelI5LayerLb{i}") for i in range(2)]
        self._store_rows = parse(text, "store_rows_kernel")
        self._host, self._findings = host, []
        self.parameter_bytes = host.parameter_bytes

    def machine_forget(self):
        self._buffers, self._findings = {}, []

    def machine_set_options(self, options):
        """There are none."""

    def machine_add_buffer(self, address, size, name, writable, initialised):
        if size.value:
            self._buffers[address.value] = (size.value, bool(writable))

    def machine_findings(self):
        return len(self._findings)

    def machine_finding(self, i):
        return self._findings[i].encode()

    def run_decode(self, parameters, tiles, requests):
        grid = parameters._obj.splits + 1, tiles, requests
        self._run(self._decode, parameters, grid, self._host.decode_threads(), self._host.decode_shared_bytes())

    def run_merge(self, parameters, tiles, requests):
        self._run(self._merge, parameters, (tiles, requests, 1), self._host.merge_threads(), 0)

    def run_store(self, parameters, requests, pages, decode):
        threads, kv_heads = self._host.store_threads(), parameters._obj.kv_heads
        grid = kv_heads, requests, 2 * pages
        self._run(self._stores[decode], parameters, grid, threads, self._host.store_shared_bytes())
        if not decode:
            self._run(self._store_rows, parameters, (kv_heads, requests, 2 * parameters._obj.row_blocks), threads, 0)

    def _run(self, program, parameters, grid, threads, shared_bytes):
        buffers = [
            (address, ctypes.string_at(address, size), writable) for address, (size, writable) in self._buffers.items()
        ]
        memory = Memory(buffers)
        try:
            run_grid(program, memory, bytes(parameters._obj), grid, threads, shared_bytes)
        except PtxError as e:
            self._findings.append(str(e))
        for address, content in memory.written():
            ctypes.memmove(address, content.tobytes(), len(content))
