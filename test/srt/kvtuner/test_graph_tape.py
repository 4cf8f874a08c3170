"""The recording that stands in for a CUDA graph: what it replays, and what it refuses."""

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from harness.graph_tape import HostRead, Tape, TapeEvent, graph


def _record(step):
    tape = Tape()
    with graph(tape):
        result = step()
    return tape, result


def test_replay_reads_new_inputs_and_writes_where_the_recording_did():
    x, total = torch.arange(4.0), torch.zeros(4)

    def step():
        total.add_(x)
        return (x.view(2, 2).t() * 2).reshape(-1) + total[0]

    tape, result = _record(step)
    address = result.data_ptr()
    x.copy_(torch.tensor([10.0, 20, 30, 40]))
    tape.replay()
    assert total.tolist() == [10, 21, 32, 43]
    assert result.tolist() == [30, 70, 50, 90]
    assert result.data_ptr() == address


def test_new_memory_holds_nothing_at_replay():
    tape, result = _record(lambda: torch.empty(3))
    result.zero_()
    tape.replay()
    assert result.isnan().all()


def test_replays_triton_launches():
    @InterpretedFunction
    def double(x, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, 2 * tl.load(x + i))

    x, out = torch.arange(4.0), torch.zeros(4)
    tape, _ = _record(lambda: double[(1,)](x, out, N=4))
    assert tape.launches == ["double"]
    x += 1
    tape.replay()
    assert out.tolist() == [2, 4, 6, 8]


def test_an_event_is_reached_at_its_place_in_every_replay():
    x, seen = torch.zeros(1), []
    event = TapeEvent(lambda: seen.append(x.item()))
    event.record()

    def step():
        x.add_(1)
        event.record()
        x.add_(1)

    tape, _ = _record(step)
    assert seen == []
    tape.replay()
    tape.replay()
    assert seen == [3, 5]


X = torch.arange(4.0)
COUNTS = torch.ones(4, dtype=torch.int64)
HOST_READS = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "int": lambda: int(X[0]),
    "bool": lambda: bool(X[0] > 1),
    "if": lambda: 1 if X.sum() > 1 else 2,
    "range": lambda: range(COUNTS[0]),
    "slice": lambda: X[: COUNTS[0]],
    "nonzero": lambda: X.nonzero(),
    "where of a mask": lambda: torch.where(X > 1),
    "mask": lambda: X[X > 1],
    "assigned mask": lambda: X.clone().__setitem__(X > 1, torch.zeros(2)),
    "masked_select": lambda: X.masked_select(X > 1),
    "repeat_interleave": lambda: X.repeat_interleave(COUNTS),
    "unique": lambda: X.unique(),
    "equal": lambda: torch.equal(X, X + 1),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "to": lambda: X.to("cpu"),
    "to, named": lambda: X.to(device="cpu"),
    "tensor of host values": lambda: torch.tensor([1, 2]),
}


@pytest.mark.parametrize("name", HOST_READS)
def test_refuses_what_needs_the_host(name):
    tape = Tape()
    with pytest.raises(HostRead, match="needs the host"), graph(tape):
        HOST_READS[name]()
    assert Tape.recording is None
    HOST_READS[name]()  # and nothing else is refused afterwards


def test_takes_what_only_looks_like_it():
    _record(
        lambda: (X[COUNTS], torch.where(X > 1, X, 0), X.repeat_interleave(COUNTS, output_size=4), X.to(torch.float16))
    )
