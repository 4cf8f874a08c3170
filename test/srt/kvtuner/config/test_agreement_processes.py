"""The check that all ranks have the same in common, in real process groups on the loopback interface."""

import datetime
import multiprocessing
import os
import socket
import time

import pytest
import torch.distributed as dist

from harness.server_args import server_args, write_model
from sglang.srt.kvtuner import hooks
from sglang.srt.kvtuner.attention import dispatch
from sglang.srt.kvtuner.attention.cpu import CpuKernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.config import agreement
from sglang.srt.kvtuner.config.agreement import Announcement
from sglang.srt.kvtuner.config.cache_format import build_cache_format
from sglang.srt.kvtuner.config.flags import KVTunerConfig, KVTunerConfigError

# Forked children have everything imported; there are no threads of torch to lose, as tests compute with one.
processes = multiprocessing.get_context("fork")


def cache_format(**settings):
    shape = {name: settings.pop(name) for name in ("num_layers", "page_size") if name in settings}
    return build_cache_format(KVTunerConfig(**settings), head_dim=64, **{"num_layers": 3, "page_size": 64, **shape})


def dies(rank):
    """What a rank does that is there, and then ends without a word."""
    agreement.require_success(lambda: os._exit(1))


def announce(values=None, files=None, **settings):
    """A rank's part in the check."""
    mine = Announcement.of(cache_format(**settings), values=values or {}, files=files or {})
    agreement.require_agreement(lambda: mine)


def join_group(rank, world_size, port_file):
    """Rank 0 takes a free port and writes it down; the others wait for it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while rank > 0 and not port_file.exists():
        time.sleep(0.01)
    port = int(port_file.read_text()) if rank > 0 else 0
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        written = port_file.with_suffix(".tmp")
        written.write_text(str(store.port))
        written.rename(port_file)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60)
    )


@pytest.fixture
def run(tmp_path):
    """Call with what each rank does: arguments of :func:`announce`, or a function of the rank. Returns what each rank that
    does not die raised, or None."""
    children = []

    def child(rank, world_size, mine, port_file, answers):
        join_group(rank, world_size, port_file)
        outcome = None
        try:
            mine(rank) if callable(mine) else announce(**mine)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        answers.put((rank, outcome))

    def run(*ranks):
        answers = processes.Queue()
        for rank, mine in enumerate(ranks):
            arguments = (rank, len(ranks), mine, tmp_path / f"port-{len(children) - rank}", answers)
            children.append(processes.Process(target=child, args=arguments, daemon=True))
            children[-1].start()
        return [outcome for _, outcome in sorted(answers.get(timeout=90) for mine in ranks if mine is not dies)]

    yield run
    for process in children:
        process.join(30)
        if process.is_alive():
            process.kill()


def test_equal_formats(run):
    assert run({}, {}, {}) == [None] * 3


def test_different_bits_stop_every_rank(run):
    raised = run({}, {}, {"nbits_value": 2})
    for rank in (0, 1):
        assert raised[rank].startswith("RanksDiffer: ") and f"This is rank {rank} on " in raised[rank]
        assert "rank 2 on " in raised[rank] and "value nbits: here 4, there 2 (all layers)" in raised[rank]
    assert "ranks 0, 1 on " in raised[2] and "value nbits: here 2, there 4 (all layers)" in raised[2]


def test_other_settings_and_weights_stop_every_rank(run):
    """With the same cache format: the ranks would serve, and their answers would be wrong."""
    ours = {"values": {"--dtype": "float32", "--chunked-prefill-size": "128"}, "files": {"model weights": {"a": "1"}}}
    theirs = {
        "values": {"--dtype": "bfloat16", "--chunked-prefill-size": "256"},
        "files": {"model weights": {"a": "2"}},
    }
    first, second = run(ours, theirs)
    assert first.endswith(
        " differs: --dtype: here float32, there bfloat16; --chunked-prefill-size: here 128, there 256; model weights: "
        "file a differs (here 1, there 2). Start every node with the same flags, model and package"
    )
    assert "--dtype: here bfloat16, there float32" in second and "(here 2, there 1)" in second


def test_a_rank_without_the_quantized_cache(run, monkeypatch):
    """It goes on to other things and never announces a cache format: the others must not wait for ever."""
    monkeypatch.setattr(agreement, "TIMEOUT", datetime.timedelta(seconds=1))
    raised = run({}, lambda rank: None)
    assert raised[1] is None
    assert "rank 1 announced no cache format within 1 s" in raised[0]


def test_a_rank_that_comes_late(run):
    def late(rank):
        time.sleep(1)
        announce()

    assert run({}, late) == [None] * 2


def test_a_rank_that_takes_long_to_look_through_its_files(run, monkeypatch):
    """It has said that it is there: looking through a checkpoint may take longer than that."""
    monkeypatch.setattr(agreement, "TIMEOUT", datetime.timedelta(seconds=1))

    def slow(rank):
        mine = Announcement.of(cache_format())
        agreement.require_agreement(lambda: time.sleep(2) or mine)

    assert run({}, slow) == [None] * 2


def refuse(rank):
    raise OSError(f"no disk {rank // 2}")


@pytest.mark.parametrize("check", [agreement.require_agreement, agreement.require_success])
def test_ranks_that_cannot_go_on_stop_every_rank(run, check):
    """Also while the others are still at work, who then hear of it as soon as they are ready."""

    def go_on(rank):
        mine = Announcement.of(cache_format())
        check(lambda: time.sleep(0.2 * rank) or mine)

    def give_up(rank):
        check(lambda: refuse(rank))

    raised = run(go_on, go_on, give_up, give_up)
    host = socket.gethostname()
    for rank in range(4):
        assert raised[rank] == (
            f"RanksDiffer: Quantized KV cache: ranks 2, 3 on {host} cannot go on: no disk 1. All ranks stop; "
            f"this is rank {rank} on {host}"
        )


def test_a_rank_that_dies_at_work(run, monkeypatch):
    monkeypatch.setattr(agreement, "TIMEOUT_OF_WORK", datetime.timedelta(seconds=1))
    (raised,) = run(lambda rank: agreement.require_success(lambda: None), dies)
    assert f"rank 1 on {socket.gethostname()} announced no cache format within 1 s" in raised
    assert raised.endswith("or see what the log of that node says")


def test_slow_work_is_waited_for(run, monkeypatch, capfd):
    monkeypatch.setattr(agreement, "TIMEOUT", datetime.timedelta(seconds=1))
    monkeypatch.setattr(agreement, "REMINDER", datetime.timedelta(seconds=1))
    monkeypatch.setattr(agreement.logger, "info", lambda text, *values: print(text % values, flush=True))
    assert run(*[lambda rank: agreement.require_success(lambda: time.sleep(2.5 * rank))] * 2) == [None] * 2
    assert f"waiting for rank 1 on {socket.gethostname()} (1 s)" in capfd.readouterr().out


def test_one_rank_does_its_work_alone(run):
    assert run(lambda rank: agreement.require_success(lambda: refuse(rank))) == ["OSError: no disk 0"]


@pytest.fixture
def arguments(tmp_path):
    """Resolved arguments of a model without weights."""
    arguments = server_args(write_model(tmp_path / "model"))
    arguments.resolve_once()
    return arguments


def with_kernels(arguments, choose):
    """What a rank does at the start, with kernels that ``choose`` makes of the cache's formats."""

    def start(rank):
        dispatch.choose_kernels = lambda device, formats: choose(device, formats)
        hooks.require_same_setup(arguments)

    return start


def test_a_node_with_weaker_kernels_stops_every_rank(run, arguments):
    """Before the model is loaded, with the reason that only that node knows."""
    best = with_kernels(arguments, lambda device, formats: dispatch.Choice(CpuKernels, ()))
    weaker = with_kernels(arguments, lambda device, formats: dispatch.Choice(ReferenceKernels, ("no compiler",)))
    raised = run(best, weaker)
    assert (
        "rank 1 on " in raised[0] and " differs: kernels: here C++, there torch reference (no compiler)." in raised[0]
    )
    assert (
        "rank 0 on " in raised[1] and " differs: kernels: here torch reference (no compiler), there C++." in raised[1]
    )
    assert (
        run(weaker, with_kernels(arguments, lambda *_: dispatch.Choice(ReferenceKernels, ("no ninja",)))) == [None] * 2
    )


def test_a_node_without_the_kernels_that_all_were_told_to_take(run, arguments):
    def refuse_to(device, formats):
        raise KVTunerConfigError(
            f"{dispatch.VARIABLE} is cpu, but {len(set(formats))} formats are too many on a {device}"
        )

    ready = with_kernels(arguments, lambda device, formats: dispatch.Choice(CpuKernels, ()))
    for raised in run(ready, with_kernels(arguments, refuse_to)):
        assert (
            f"rank 1 on {socket.gethostname()} cannot go on: SGLANG_KVTUNER_KERNELS is cpu, but 1 formats are" in raised
        )


def test_two_checks_in_one_process_group(run):
    """A second check, with other formats, does not read what the first one left."""

    def twice(rank):
        announce()
        time.sleep(0.5 * rank)  # rank 0 looks while rank 1 has announced nothing new
        announce(nbits_key=2 if rank else 8)

    raised = run(twice, twice)
    assert "key nbits: here 8, there 2" in raised[0]
    assert "key nbits: here 2, there 8" in raised[1]


def test_one_rank_needs_no_agreement(run):
    assert run({}) == [None]


def test_without_a_process_group_there_is_nothing_to_compare():
    assert not dist.is_initialized()
    announce()
