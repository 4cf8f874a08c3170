"""Registers hold uint64; what an instruction means by them is its type."""

import numpy as np

WIDTH = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
SIGNED = {"8": np.int8, "16": np.int16, "32": np.int32, "64": np.int64}


def from_raw(raw, kind):
    if kind == "pred":
        return raw.astype(bool)
    if kind == "f32":
        return raw.astype(np.uint32).view(np.float32)
    if kind == "f16":
        return raw.astype(np.uint16).view(np.float16)
    if kind == "f16x2":
        return raw.astype(np.uint32).view(np.float16).reshape(-1, 2)
    if kind == "bf16x2":
        return (raw.astype(np.uint32).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, 2)
    return raw.astype((SIGNED if kind[0] == "s" else WIDTH)[kind[1:]])


def to_raw(values, kind):
    if kind == "pred":
        return values.astype(np.uint64)
    if kind == "f32":
        return values.astype(np.float32).view(np.uint32).astype(np.uint64)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint64)
    if kind == "f16x2":
        return np.ascontiguousarray(values.astype(np.float16)).view(np.uint32).reshape(-1).astype(np.uint64)
    if kind == "bf16x2":
        bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        rounded = np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint64)
        return rounded[:, 0] | rounded[:, 1] << np.uint64(16)
    return values.astype(WIDTH[kind[1:]]).astype(np.uint64)


def size_of(kind):
    return int(kind[1:]) // 8
