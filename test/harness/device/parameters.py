"""The kernels' arguments, as decode_parameters.h and store_parameters.h have them, and the machine's options."""

import ctypes

Pointer, Int64, Int32, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


class DecodeParameters(ctypes.Structure):
    _fields_ = [
        *_fields(Pointer, "q k v out"),
        *_fields(Int64, "q_stride k_stride v_stride out_stride"),
        *_fields(Pointer, "k_pages v_pages k_ring v_ring k_sinks v_sinks slots prefix_lens packed_end pages"),
        *_fields(Int64, "pages_stride"),
        *_fields(Pointer, "part_out part_lse arrivals"),
        *_fields(Int32, "kv_heads group splits ring_length sink_length"),
        ("scaling", Float),
    ]


class StoreParameters(ctypes.Structure):
    _fields_ = [
        *_fields(Pointer, "k v"),
        *_fields(Int64, "k_stride v_stride"),
        *_fields(Pointer, "k_pages v_pages k_ring v_ring k_sinks v_sinks slots query_start prefix_lens pages"),
        *_fields(Int64, "pages_stride"),
        *_fields(Pointer, "nonfinite_blocks"),
        *_fields(Int32, "kv_heads ring_length sink_length row_blocks"),
    ]


class Options(ctypes.Structure):
    """late_copies: cp.async lands at its wait, else at once. order: of warps and lanes, 0 ascending, 1 descending, else a seed."""

    _fields_ = _fields(Int32, "late_copies cutting_mma order")
