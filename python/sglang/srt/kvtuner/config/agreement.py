"""Do all ranks hold the same cache format? Checked once, before any memory is sized."""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import socket

import torch.distributed as dist

from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.version import __version__

logger = logging.getLogger(__name__)

TIMEOUT = datetime.timedelta(seconds=60)

# Every call has keys of its own: a second one would otherwise read what the first one left in the store.
_calls = itertools.count()


def require_same_format(cache_format: CacheFormat) -> None:
    """Compare this rank's cache format with every other rank's.

    Uses the process group's store rather than a collective, so that a rank started without the quantized cache is
    noticed instead of waited for. Raises RuntimeError on every rank, naming the rank and what differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore(f"sglang/kvtuner/plan/{next(_calls)}", dist.distributed_c10d._get_default_store())
    mine = {
        "digest": cache_format.digest(),
        "host": socket.gethostname(),
        "version": __version__,
        "settings": cache_format.settings(),
    }
    store.set(f"plan/{rank}", json.dumps(mine))
    announced = _await_announcements(store, _describe([rank], mine), world_size)
    problems = _problems(mine, announced)
    _wait_for_readers(store, rank, world_size)
    if problems:
        raise RuntimeError(
            f"Quantized KV cache: ranks hold different cache formats. This is {_describe([rank], mine)}. "
            f"{'. '.join(problems)}. Start every node with the same --kvtuner-* flags"
        )
    logger.info("Quantized KV cache: all %d ranks hold cache format %s", world_size, mine["digest"][:12])


def differences(mine: dict, theirs: dict) -> list[str]:
    """Settings that differ, as ``name: here X, there Y``; equal differences of many layers are merged."""
    found = []
    for name in ("page_size", "residual_length"):
        if mine[name] != theirs[name]:
            found.append(f"{name}: here {mine[name]}, there {theirs[name]}")
    if len(mine["layers"]) != len(theirs["layers"]):
        return [*found, f"layers: here {len(mine['layers'])}, there {len(theirs['layers'])}"]
    by_change: dict[str, list[int]] = {}
    layers = ([_layer_settings(layer) for layer in settings["layers"]] for settings in (mine, theirs))
    for index, (ours, others) in enumerate(zip(*layers)):
        for name, value in ours.items():
            if value != others.get(name):
                by_change.setdefault(f"{name}: here {value}, there {others.get(name)}", []).append(index)
    count = len(mine["layers"])
    found += [f"{change} ({_layers(indices, count)})" for change, indices in by_change.items()]
    return found


def _layer_settings(layer: dict) -> dict:
    """A layer's settings by name, without the page size, which is that of the cache_format."""
    halves = {f"{half} {name}": value for half in ("key", "value") for name, value in layer[half].items()}
    found = {**halves, "sink_length": layer.get("sink_length")}
    return {name: value for name, value in found.items() if not name.endswith(" page_size")}


def _await_announcements(store: dist.Store, mine: str, world_size: int) -> list[dict]:
    """What every rank announced, by rank. ``mine`` describes this rank in errors."""
    keys = [f"plan/{other}" for other in range(world_size)]
    try:
        store.wait(keys, TIMEOUT)
        return [json.loads(store.get(key)) for key in keys]
    except RuntimeError as error:
        silent = _silent_ranks(store, keys)
        if silent is None:
            reason = "rank 0's node ended before every rank had announced its cache format; its log says more"
        else:
            reason = f"{_ranks(silent) if silent else 'a rank'} announced no cache format within {TIMEOUT.seconds} s"
        raise RuntimeError(
            f"Quantized KV cache: {reason} (seen from {mine}). Start every node with --enable-kvtuner-quant and the "
            "same --kvtuner-* flags"
        ) from error


def _silent_ranks(store: dist.Store, keys: list[str]) -> list[int] | None:
    """Ranks without an announcement, or None where the store is gone: rank 0's process holds it."""
    try:
        return [other for other, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return None


def _problems(mine: dict, announced: list[dict]) -> list[str]:
    """One sentence for every host and cache format that differs from ``mine``."""
    groups: dict[tuple[str, str], list[int]] = {}
    for other, theirs in enumerate(announced):
        if theirs["digest"] != mine["digest"]:
            groups.setdefault((theirs["host"], theirs["digest"]), []).append(other)
    problems = []
    for ranks in groups.values():
        theirs = announced[ranks[0]]
        changes = differences(mine["settings"], theirs["settings"])
        if theirs["version"] != mine["version"]:
            changes.append(f"sglang version: here {mine['version']}, there {theirs['version']}")
        verb = "differ" if len(ranks) > 1 else "differs"
        problems.append(f"{_describe(ranks, theirs)} {verb}: {'; '.join(changes)}")
    return problems


def _wait_for_readers(store: dist.Store, rank: int, world_size: int) -> None:
    """Return when every rank has read all announcements; a rank that left earlier could take the store with it."""
    try:
        store.set(f"read/{rank}", "")
        store.wait([f"read/{other}" for other in range(world_size)], TIMEOUT)
    except RuntimeError:
        # The store is gone, or a rank died: either way this rank has read what it needs, and says so itself.
        logger.debug("Quantized KV cache: not every rank was waited for", exc_info=True)


def _describe(ranks: list[int], announcement: dict) -> str:
    return f"{_ranks(ranks)} on {announcement['host']} (cache format {announcement['digest'][:12]})"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _layers(indices: list[int], count: int) -> str:
    if len(indices) == count:
        return "all layers"
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"layer{'s' if len(indices) > 1 else ''} {shown}"
