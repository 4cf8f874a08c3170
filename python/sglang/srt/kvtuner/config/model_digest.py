"""What tells one checkpoint from another: sizes and samples of its files, quick for a hundred gigabytes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Bytes. Smaller files are read whole; of larger ones the first and last EDGE, a safetensors header as long as it is, and
# SAMPLES places in between, evenly spaced: a weight matrix of any size that matters is among them.
WHOLE = 16 << 20
EDGE = 1 << 20
SAMPLE = 4 << 10
SAMPLES = 64
# The longest header that the safetensors format allows.
LONGEST_HEADER = 100_000_000

# The first pattern that a folder has files for is the one that is loaded.
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}
# Every rank looks for stop words and compiles grammars, with a tokenizer of its own.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt")


@functools.cache
def weight_files(path: str) -> dict[str, str] | None:
    """Size and sample of every weight file of a local checkpoint, by file name; None where ``path`` is not local.

    ``path`` is a folder or a single file, whose name is its suffix then: the path may differ between nodes.
    """
    local = Path(path)
    if local.is_file():
        return {local.suffix: describe_file(local)}
    if not local.is_dir():
        return None
    return {file.name: describe_file(file) for file in _weight_paths(local)}


@functools.cache
def tokenizer_files(path: str) -> dict[str, str] | None:
    """As :func:`weight_files` for what decides how text becomes tokens."""
    local = Path(path)
    if not local.is_dir():
        return None
    return {name: describe_file(local / name) for name in TOKENIZER_FILES if (local / name).is_file()}


def describe_file(path: Path) -> str:
    """Size in bytes and SHA-256 of the file or of samples of it; the reason where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = path.stat().st_size
            hasher = hashlib.sha256()
            for offset, length in _places(file, size, path.suffix == ".safetensors"):
                file.seek(offset)
                hasher.update(file.read(length))
    except OSError as error:
        # Told to the other ranks like any difference; a rank that raised here would leave them waiting.
        return f"unreadable ({error.strerror})"
    return f"{size:,} bytes, sample {hasher.hexdigest()[:12]}"


def _places(file: BinaryIO, size: int, safetensors: bool) -> Iterator[tuple[int, int]]:
    """Offset and length in bytes of what is read of a file."""
    if size <= WHOLE:
        yield 0, size
        return
    header = 8 + int.from_bytes(file.read(8), "little") if safetensors else 0
    yield 0, max(EDGE, min(header, LONGEST_HEADER))
    for place in range(1, SAMPLES + 1):
        yield size * place // (SAMPLES + 1), SAMPLE
    yield size - EDGE, EDGE


def _weight_paths(folder: Path) -> list[Path]:
    for pattern in WEIGHT_PATTERNS:
        found = sorted(path for path in folder.glob(pattern) if path.name not in NO_WEIGHTS)
        if found:
            # Beside the shards there may be the same weights once more in one file, which is not loaded.
            indexed = _indexed_names(folder / "model.safetensors.index.json") if pattern == "*.safetensors" else set()
            return [path for path in found if path.name in indexed] or found
    return []


def _indexed_names(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        # None, or one that no loader could read either.
        return set()
