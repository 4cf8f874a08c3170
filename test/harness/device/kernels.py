"""The CUDA kernels behind the interface of kernels, run by the host machine."""

import ctypes

import torch

from harness.device.build import load_library
from harness.device.parameters import DecodeParameters, Options, StoreParameters
from sglang.srt.kvtuner.attention.base import Kernels

HEAD_TILE = 8  # query heads of a KV head that a block serves


class DeviceKernels(Kernels):
    """Decode steps, and stores of any step, of a cache whose tensors are on the CPU.

    splits: parts of the packed pages. merge_apart: by its own kernel. library: see build.py; without one each layer's is built.
    Raises AssertionError with what the machine found.
    """

    name = "CUDA kernels on the host machine"

    def __init__(self, storage, workload=None, *, splits=1, merge_apart=False, library=None, **options):
        super().__init__(storage, workload)
        self.splits, self.merge_apart, self._library = splits, merge_apart, library
        self._options = Options(**{"late_copies": 1, **options})
        self.bf16 = storage.dtype == torch.bfloat16
        for half in storage.keys + storage.values:
            half.ring.fill_(torch.nan)  # what nobody stored must not be read

    @classmethod
    def supports(cls, layer):
        raise NotImplementedError("tests choose formats that the kernels have")

    @staticmethod
    def pack_pages(x, fmt):
        raise NotImplementedError("pages are packed by steps")

    def attend(self, layer, plan, q, k, v, scaling):
        library, stored = self._begin(layer), self.storage.layers[layer]
        requests, heads, dim = q.shape
        assert plan.most_queries == 1 and requests == plan.slots.shape[0]
        kv_heads = self.storage.kv_heads
        group = heads // kv_heads
        tiles = kv_heads * -(-group // HEAD_TILE)
        out = torch.full_like(q, torch.nan)
        parts = requests * tiles * (self.splits + 1) * HEAD_TILE
        part_out, part_lse = torch.full((parts, dim), torch.nan), torch.full((parts,), torch.nan)
        arrivals = torch.zeros(requests * tiles, dtype=torch.int32)
        parameters = DecodeParameters(
            q_stride=q.stride(0), k_stride=k.stride(0), v_stride=v.stride(0), out_stride=out.stride(0),
            pages_stride=plan.pages.stride(0), kv_heads=kv_heads, group=group, splits=self.splits,
            ring_length=self.storage.ring_length, sink_length=stored.key.sinks.shape[1], scaling=scaling,
        )  # fmt: skip
        read = {"q": q, "k": k, "v": v, **_buffers(stored)}
        read |= {name: getattr(plan, name) for name in ("slots", "prefix_lens", "packed_end", "pages")}
        self._hand_over(library, parameters, read)
        self._hand_over(library, parameters, {"out": out, "part_out": part_out, "part_lse": part_lse}, "w")
        if not self.merge_apart:
            self._hand_over(library, parameters, {"arrivals": arrivals}, "rw")
        library.run_decode(ctypes.byref(parameters), tiles, requests)
        if self.merge_apart:
            library.run_merge(ctypes.byref(parameters), tiles, requests)
        _no_findings(library)
        assert not arrivals.any(), "the counters are not reset for the next launch"
        return out

    def store(self, layer, plan, k, v):
        library, stored = self._begin(layer), self.storage.layers[layer]
        lengths = plan.query_start.diff()
        parameters = StoreParameters(
            k_stride=k.stride(0), v_stride=v.stride(0), pages_stride=plan.pages.stride(0),
            kv_heads=self.storage.kv_heads, ring_length=self.storage.ring_length,
            sink_length=stored.key.sinks.shape[1], row_blocks=3,
        )  # fmt: skip
        read = {name: getattr(plan, name) for name in ("slots", "query_start", "prefix_lens", "pages")}
        self._hand_over(library, parameters, {"k": k, "v": v, **read})
        written = {**_buffers(stored), "nonfinite_blocks": self.storage.nonfinite_blocks}
        self._hand_over(library, parameters, written, "rw")
        page = self.storage.page_size
        completed = (plan.prefix_lens + lengths) // page - plan.prefix_lens // page
        pages = max(int(completed.max()), 1)
        library.run_store(ctypes.byref(parameters), plan.slots.shape[0], pages, int(plan.most_queries == 1))
        _no_findings(library)

    def _begin(self, layer):
        stored = self.storage.layers[layer]
        library = self._library or load_library(_layer_format(stored), self.bf16)
        assert library.parameter_bytes(0) == ctypes.sizeof(DecodeParameters)
        assert library.parameter_bytes(1) == ctypes.sizeof(StoreParameters)
        library.machine_forget()
        library.machine_set_options(ctypes.byref(self._options))
        return library

    @staticmethod
    def _hand_over(library, parameters, tensors, access="r"):
        """Sets the pointers and tells the machine of the buffers. access: "w" where what was there must not be read."""
        for name, tensor in tensors.items():
            setattr(parameters, name, tensor.data_ptr())
            storage = tensor.untyped_storage()
            flags = int(access != "r"), int(access != "w")
            library.machine_add_buffer(
                ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), name.encode(), *flags
            )


def _layer_format(stored):
    from sglang.srt.kvtuner.format.formats import LayerFormat

    return LayerFormat(stored.key.format, stored.value.format)


def _buffers(stored):
    halves = (("k", stored.key), ("v", stored.value))
    return {f"{half}_{name}": getattr(tensors, name) for half, tensors in halves for name in ("pages", "ring", "sinks")}


def _no_findings(library):
    found = [library.machine_finding(i).decode() for i in range(library.machine_findings())]
    assert not found, "the machine found:\n" + "\n".join(found)
