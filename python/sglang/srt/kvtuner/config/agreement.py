"""Do all ranks hold the same cache format, and serve the same model with the same settings and code?"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from sglang.srt.kvtuner.config.cache_format import CacheFormat

logger = logging.getLogger(__name__)

# How long to wait for a rank to come at all, and for it to have looked through its model's files.
TIMEOUT = datetime.timedelta(seconds=60)
TIMEOUT_OF_FILES = datetime.timedelta(seconds=600)
# A message has at most so many differences of one node, and so many files of one kind.
MOST_DIFFERENCES = 12
MOST_FILES = 3

# Every call has keys of its own: a second one would otherwise read what the first one left in the store.
_calls = itertools.count()


@dataclass(frozen=True)
class Announcement:
    """What a rank says of itself.

    format_digest, cache_format: the cache format's digest and settings. values: settings as text, by flag or name.
    files: by kind, for every file's name what tells its content. host: the machine's name.
    """

    format_digest: str
    cache_format: dict[str, Any]
    values: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)

    @classmethod
    def of(cls, cache_format: CacheFormat, **rest: Any) -> Announcement:
        return cls(cache_format.digest(), cache_format.settings(), **rest)

    def differences(self, other: Announcement) -> list[str]:
        """What differs, as ``name: here X, there Y``."""
        found = format_differences(self.cache_format, other.cache_format)
        for name in dict.fromkeys([*self.values, *other.values]):
            if _differ(name, self.values, other.values):
                found.append(f"{name}: {_both(name, self.values, other.values)}")
        # A kind of file that one side could not look at is not compared.
        for kind in [kind for kind in self.files if kind in other.files]:
            found += _file_differences(kind, self.files[kind], other.files[kind])
        return found


def require_agreement(announce: Callable[[], Announcement]) -> None:
    """Compare this rank's announcement with every other rank's; ``announce`` makes it, and may take its time.

    Uses the process group's store rather than a collective, so that a rank started without the quantized cache is
    noticed instead of waited for. Raises RuntimeError on every rank, naming the ranks and what differs. Does nothing
    with one rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore(f"sglang/kvtuner/agreement/{next(_calls)}", dist.distributed_c10d._get_default_store())
    _exchange(store, "present", rank, "", world_size, TIMEOUT)
    mine = announce()
    texts = _exchange(store, "announcement", rank, json.dumps(asdict(mine)), world_size, TIMEOUT_OF_FILES)
    problems = _problems(mine, [Announcement(**json.loads(text)) for text in texts])
    _wait_for_readers(store, rank, world_size)
    if problems:
        raise RuntimeError(
            f"Quantized KV cache: ranks differ in what they must have in common. This is {_describe([rank], mine)}. "
            f"{'. '.join(problems)}. Start every node with the same flags, model and package"
        )
    compared = ", ".join([*(["settings"] if mine.values else []), *mine.files])
    logger.info(
        "Quantized KV cache: all %d ranks hold cache format %s%s",
        world_size, mine.format_digest[:12], f" and the same {compared}" if compared else "",
    )  # fmt: skip


def format_differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What differs in two cache formats' settings; equal differences of many layers are merged."""
    found = []
    for name, flag in (("page_size", "--page-size"), ("residual_length", "--kvtuner-residual-length")):
        if mine[name] != theirs[name]:
            found.append(f"{flag}: here {mine[name]}, there {theirs[name]}")
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


def _layer_settings(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's settings by name, without the page size, which is that of the cache_format."""
    halves = {f"{half} {name}": value for half in ("key", "value") for name, value in layer[half].items()}
    found = {**halves, "sink_length": layer.get("sink_length")}
    return {name: value for name, value in found.items() if not name.endswith(" page_size")}


def _file_differences(kind: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    names = [name for name in sorted({*mine, *theirs}) if _differ(name, mine, theirs)]
    found = [f"{kind}: file {name} differs ({_both(name, mine, theirs)})" for name in names[:MOST_FILES]]
    if len(names) > MOST_FILES:
        found.append(f"{kind}: {len(names) - MOST_FILES} more files differ")
    return found


def _differ(name: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    return mine.get(name) != theirs.get(name)


def _both(name: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    return f"here {mine.get(name, 'absent')}, there {theirs.get(name, 'absent')}"


def _exchange(
    store: dist.Store, what: str, rank: int, text: str, world_size: int, timeout: datetime.timedelta
) -> list[str]:
    """Give this rank's text and return every rank's, by rank. Raises RuntimeError naming the ranks that give none."""
    keys = [f"{what}/{other}" for other in range(world_size)]
    try:
        store.set(keys[rank], text)
        store.wait(keys, timeout)
        return [store.get(key).decode() for key in keys]
    except RuntimeError as error:
        silent = _silent_ranks(store, keys)
        if silent is None:
            reason = "rank 0's node ended before every rank had announced its cache format; its log says more"
        else:
            reason = f"{_ranks(silent) if silent else 'a rank'} announced no cache format within {timeout.seconds} s"
        raise RuntimeError(
            f"Quantized KV cache: {reason} (seen from rank {rank} on {socket.gethostname()}). Start every node with "
            "--enable-kvtuner-quant and the same --kvtuner-* flags"
        ) from error


def _silent_ranks(store: dist.Store, keys: list[str]) -> list[int] | None:
    """Ranks that gave nothing, or None where the store is gone: rank 0's process holds it."""
    try:
        return [other for other, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return None


def _problems(mine: Announcement, announced: list[Announcement]) -> list[str]:
    """One sentence for every host and set of differences from ``mine``."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for other, theirs in enumerate(announced):
        if changes := mine.differences(theirs):
            groups.setdefault((theirs.host, *changes), []).append(other)
    problems = []
    for (_, *changes), ranks in groups.items():
        verb = "differ" if len(ranks) > 1 else "differs"
        more = len(changes) - MOST_DIFFERENCES
        shown = [*changes[:MOST_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
        problems.append(f"{_describe(ranks, announced[ranks[0]])} {verb}: {'; '.join(shown)}")
    return problems


def _wait_for_readers(store: dist.Store, rank: int, world_size: int) -> None:
    """Return when every rank has read all announcements; a rank that left earlier could take the store with it."""
    try:
        store.set(f"read/{rank}", "")
        store.wait([f"read/{other}" for other in range(world_size)], TIMEOUT)
    except RuntimeError:
        # The store is gone, or a rank died: either way this rank has read what it needs, and says so itself.
        logger.debug("Quantized KV cache: not every rank was waited for", exc_info=True)


def _describe(ranks: list[int], announcement: Announcement) -> str:
    return f"{_ranks(ranks)} on {announcement.host} (cache format {announcement.format_digest[:12]})"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _layers(indices: list[int], count: int) -> str:
    if len(indices) == count:
        return "all layers"
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"layer{'s' if len(indices) > 1 else ''} {shown}"
