"""What upstream's scheduler process says of an exception: our refusals in one message, everything else as before."""

import logging
import signal
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from sglang.srt.kvtuner.config.agreement import RanksDiffer
from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.managers import scheduler


@pytest.fixture
def said(monkeypatch, caplog):
    """Call with an exception that stops a scheduler at its start; returns what the process logs of it."""
    parent = Mock()
    for name in ("load_plugins", "publish", "spawn_world_rank", "SpawnRanks", "configure_scheduler_process"):
        monkeypatch.setattr(scheduler, name, Mock())
    monkeypatch.setattr(scheduler, "get_observability", lambda: SimpleNamespace(enable_trace=False))
    monkeypatch.setattr(scheduler, "psutil", SimpleNamespace(Process=lambda: SimpleNamespace(parent=lambda: parent)))

    def said(error):
        monkeypatch.setattr(scheduler, "Scheduler", Mock(side_effect=error))
        with caplog.at_level(logging.ERROR):
            scheduler.run_scheduler_process(None, None, 0, 0, 0, None, None)
        parent.send_signal.assert_called_once_with(signal.SIGQUIT)
        return caplog.messages[-1]

    return said


@pytest.mark.parametrize("error", [RanksDiffer("ranks differ"), KVTunerConfigError("too little memory")], ids=type)
def test_a_refusal_is_one_message(said, error):
    assert said(error) == f"Scheduler hit an exception: {error}"


def test_other_exceptions_keep_their_traceback(said):
    message = said(ValueError("something else"))
    assert "Traceback (most recent call last)" in message and message.rstrip().endswith("ValueError: something else")
