"""Do all ranks hold the same cache format, and serve the same model with the same settings and code? Where one cannot, all stop.

Ranks talk through the process group's store rather than in collectives: in a collective that a rank does not enter, the others
wait without a word.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist

from sglang.srt.kvtuner.config.cache_format import CacheFormat

logger = logging.getLogger(__name__)

# How long to wait for a rank to come at all, and for what it then has to do: look through its model's files, build kernels.
TIMEOUT = datetime.timedelta(seconds=60)
TIMEOUT_OF_WORK = datetime.timedelta(seconds=600)
# A rank that waits says so in its log as often as this.
REMINDER = datetime.timedelta(seconds=15)
# A message has at most so many differences of one node, and so many files of one kind.
MOST_DIFFERENCES = 12
MOST_FILES = 3


class RanksDiffer(RuntimeError):
    """The ranks cannot serve together; the message has what every one of them is told."""


_Made = TypeVar("_Made")

# Every call has keys of its own: a second one would otherwise read what the first one left in the store.
_calls = itertools.count()


@dataclass(frozen=True)
class Announcement:
    """What a rank says of itself.

    format_digest, cache_format: the cache format's digest and settings. values: settings as text, by flag or name.
    files: by kind, for every file's name what tells its content. host: the machine's name. remarks: by name of a value, why it
    is that; not compared, but told where the value differs.
    """

    format_digest: str
    cache_format: dict[str, Any]
    values: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)
    remarks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, cache_format: CacheFormat, **rest: Any) -> Announcement:
        return cls(cache_format.digest(), cache_format.settings(), **rest)

    def differences(self, other: Announcement) -> list[str]:
        """What differs, as ``name: here X, there Y``."""
        found = format_differences(self.cache_format, other.cache_format)
        for name in dict.fromkeys([*self.values, *other.values]):
            if _differ(name, self.values, other.values):
                found.append(f"{name}: {_both(name, _remarked(self), _remarked(other))}")
        # A kind of file that one side could not look at is not compared.
        for kind in [kind for kind in self.files if kind in other.files]:
            found += _file_differences(kind, self.files[kind], other.files[kind])
        return found


def require_agreement(announce: Callable[[], Announcement]) -> None:
    """Compare this rank's announcement with every other rank's; ``announce`` makes it, and may take its time.

    Raises RanksDiffer on every rank, naming the ranks and what differs, or the ranks whose ``announce`` raised and why. Does
    nothing with one rank.
    """
    if _alone():
        return
    mine, texts = _together(announce, lambda made: json.dumps(asdict(made)))
    if problems := _problems(mine, [Announcement(**json.loads(text)) for text in texts]):
        raise RanksDiffer(
            f"Quantized KV cache: ranks differ in what they must have in common. This is {_describe([dist.get_rank()], mine)}. "
            f"{'. '.join(problems)}. Start every node with the same flags, model and package"
        )
    compared = ", ".join([*(["settings"] if mine.values else []), *mine.files])
    logger.info(
        "Quantized KV cache: all %d ranks hold cache format %s%s",
        len(texts), mine.format_digest[:12], f" and the same {compared}" if compared else "",
    )  # fmt: skip


def require_success(work: Callable[[], None]) -> None:
    """Do ``work`` on every rank. Where it raises on one, every rank raises RanksDiffer with the rank, its host and the reason;
    with one rank, what ``work`` raises."""
    if _alone():
        work()
    else:
        _together(work, lambda _: "")


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _together(make: Callable[[], _Made], text_of: Callable[[_Made], str]) -> tuple[_Made, list[str]]:
    """What ``make`` makes on this rank, and the texts of what it made on every rank. Raises RanksDiffer on every rank where it
    raised on one, or where a rank does not come."""
    rank, world_size, host = dist.get_rank(), dist.get_world_size(), socket.gethostname()
    store = dist.PrefixStore(f"sglang/kvtuner/agreement/{next(_calls)}", dist.distributed_c10d._get_default_store())
    hosts = _exchange(store, "present", rank, host, [None] * world_size, TIMEOUT)
    made: Any = None
    cause: Exception | None = None
    try:
        made = make()
        answer = {"text": text_of(made)}
    except Exception as error:
        answer, cause = {"failure": str(error) or repr(error)}, error
    texts = _exchange(store, "answer", rank, json.dumps(answer), hosts, TIMEOUT_OF_WORK)
    answers = [json.loads(text) for text in texts]
    _wait_for_readers(store, rank, world_size)
    if failed := _failures(answers, hosts):
        raise RanksDiffer(
            f"Quantized KV cache: {'. '.join(failed)}. All ranks stop; this is rank {rank} on {host}"
        ) from cause
    return made, [answer["text"] for answer in answers]


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


def _remarked(announcement: Announcement) -> dict[str, str]:
    remarks = announcement.remarks
    return {
        name: f"{value} ({remarks[name]})" if name in remarks else value for name, value in announcement.values.items()
    }


def _both(name: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    return f"here {mine.get(name, 'absent')}, there {theirs.get(name, 'absent')}"


def _exchange(
    store: dist.Store, what: str, rank: int, text: str, hosts: Sequence[str | None], timeout: datetime.timedelta
) -> list[str]:
    """Give this rank's text and return every rank's, by rank. hosts: of every rank, None where it is not known yet. Raises
    RanksDiffer naming the ranks that give none."""
    keys = [f"{what}/{other}" for other in range(len(hosts))]
    try:
        store.set(keys[rank], text)
        _wait(store, keys, hosts, timeout)
        return [store.get(key).decode() for key in keys]
    except RuntimeError as error:
        silent = _silent_ranks(store, keys)
        if silent is None:
            reason = "rank 0's node ended before every rank had announced its cache format; its log says more"
        else:
            reason = f"{_where(silent, hosts)} announced no cache format within {timeout.seconds} s"
        raise RanksDiffer(
            f"Quantized KV cache: {reason} (seen from rank {rank} on {socket.gethostname()}). Start every node with "
            "--enable-kvtuner-quant and the same --kvtuner-* flags, or see what the log of that node says"
        ) from error


def _wait(store: dist.Store, keys: list[str], hosts: Sequence[str | None], timeout: datetime.timedelta) -> None:
    """Return when all keys are there. The log says every REMINDER for whom this rank waits. Raises RuntimeError."""
    start = time.monotonic()
    while True:
        left = timeout - datetime.timedelta(seconds=time.monotonic() - start)
        try:
            return store.wait(keys, max(min(left, REMINDER), datetime.timedelta(milliseconds=1)))
        except RuntimeError:
            silent = _silent_ranks(store, keys)
            if silent is None or left <= REMINDER:
                raise
            if silent:
                logger.info(
                    "Quantized KV cache: waiting for %s (%.0f s)", _where(silent, hosts), time.monotonic() - start
                )


def _silent_ranks(store: dist.Store, keys: list[str]) -> list[int] | None:
    """Ranks that gave nothing, or None where the store is gone: rank 0's process holds it."""
    try:
        return [other for other, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return None


def _failures(answers: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """One sentence for every host and reason not to go on."""
    groups: dict[tuple[str, str], list[int]] = {}
    for other, answer in enumerate(answers):
        if "failure" in answer:
            groups.setdefault((hosts[other], answer["failure"]), []).append(other)
    return [f"{_ranks(ranks)} on {host} cannot go on: {reason}" for (host, reason), ranks in groups.items()]


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


def _where(ranks: list[int], hosts: Sequence[str | None]) -> str:
    """The ranks, and the machines that they are on."""
    known = dict.fromkeys(host for rank in ranks if (host := hosts[rank]))
    return _ranks(ranks) + (f" on {', '.join(known)}" if known else "")


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _layers(indices: list[int], count: int) -> str:
    if len(indices) == count:
        return "all layers"
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"layer{'s' if len(indices) > 1 else ''} {shown}"
