"""Do all ranks hold the same layer plan? Checked once, before any memory is sized."""

from __future__ import annotations

import datetime
import json
import socket
from typing import Any

import torch.distributed as dist

from sglang.srt.kvtuner.plan import CachePlan

TIMEOUT = datetime.timedelta(seconds=60)
_PREFIX = "sglang/kvtuner/plan"


def require_same_plan(plan: CachePlan) -> None:
    """Compare this rank's plan with every other rank's.

    Uses the process group's store rather than a collective, so that a rank started without the quantized cache is
    noticed instead of waited for. Raises RuntimeError on every rank, naming the rank and what differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    announcement = {"digest": plan.digest(), "host": socket.gethostname(), "settings": plan.settings()}
    store.set(f"{_PREFIX}/{rank}", json.dumps(announcement))
    mine = _describe(rank, announcement)
    problems = []
    for other in range(world_size):
        key = f"{_PREFIX}/{other}"
        try:
            store.wait([key], TIMEOUT)
        except Exception as error:
            raise RuntimeError(
                f"Quantized KV cache: rank {other} announced no plan within {TIMEOUT.seconds} s (seen from {mine}). "
                "Start every node with --enable-kvtuner-quant and the same --kvtuner-* flags"
            ) from error
        theirs = json.loads(store.get(key))
        if theirs["digest"] != announcement["digest"]:
            changes = "; ".join(differences(announcement["settings"], theirs["settings"]))
            problems.append(f"{_describe(other, theirs)} differs: {changes}")
    # All ranks read all announcements before any may leave and take the store with it.
    _wait_for_all(store, world_size)
    if problems:
        raise RuntimeError(
            f"Quantized KV cache: ranks hold different plans. This is {mine}. {'. '.join(problems)}. Start every node "
            "with the same --kvtuner-* flags"
        )


def differences(mine: dict, theirs: dict) -> list[str]:
    """Settings that differ, as ``name: here X, there Y``; equal differences of many layers are merged."""
    found = []
    for name in ("page_size", "residual_length"):
        if mine[name] != theirs[name]:
            found.append(f"{name}: here {mine[name]}, there {theirs[name]}")
    if len(mine["layers"]) != len(theirs["layers"]):
        return [*found, f"layers: here {len(mine['layers'])}, there {len(theirs['layers'])}"]
    by_change: dict[str, list[int]] = {}
    for index, (ours, others) in enumerate(zip(mine["layers"], theirs["layers"])):
        for part in ("key", "value"):
            for field, value in ours[part].items():
                if value != others[part][field]:
                    change = f"{part} {field}: here {value}, there {others[part][field]}"
                    by_change.setdefault(change, []).append(index)
    count = len(mine["layers"])
    found += [f"{change} ({_layers(indices, count)})" for change, indices in by_change.items()]
    return found


def _layers(indices: list[int], count: int) -> str:
    if len(indices) == count:
        return "all layers"
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"layer{'s' if len(indices) > 1 else ''} {shown}"


def _describe(rank: int, announcement: dict[str, Any]) -> str:
    return f"rank {rank} on {announcement['host']} (plan {announcement['digest'][:12]})"


def _wait_for_all(store: Any, world_size: int) -> None:
    store.add(f"{_PREFIX}/read", 1)
    deadline = datetime.datetime.now() + TIMEOUT
    while store.add(f"{_PREFIX}/read", 0) < world_size:
        if datetime.datetime.now() > deadline:
            return
        import time

        time.sleep(0.05)
