"""Serving a configuration for tasks, and what is taken from their results."""

import sys

import pytest

from sglang.srt.kvtuner.tuner import served
from sglang.srt.kvtuner.tuner.errors import TuningError
from sglang.srt.kvtuner.tuner.served import TaskSettings, serve, shares_of_right_answers


class ShortLived(served.Server):
    """Says what it was given and ends."""

    def start(self):
        given = [*self.command[3:], f"HF_HUB_OFFLINE={self._environment.get('HF_HUB_OFFLINE')}"]
        self.command = [sys.executable, "-c", f"print({' '.join(given)!r})"]
        return super().start()


@pytest.mark.parametrize("offline", [None, "1"])
def test_a_server_that_does_not_start_is_told_with_its_flags_and_log(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(served, "Server", ShortLived)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    settings = TaskSettings("org/Model", ("--dtype", "float32"), tmp_path / "logs" / "server.log")
    with pytest.raises(TuningError, match="the server for --flag 1: the server ended with exit status 0") as caught:
        with serve(settings, ["--flag", "1"]):
            pass
    log = str(caught.value).splitlines()[-1]
    # Whether a name is looked up on the hub stays as the tuner's own process has it.
    assert "--model-path org/Model" in log and log.endswith(f"--dtype float32 --flag 1 HF_HUB_OFFLINE={offline}")


def test_filters_of_a_task_are_told_apart():
    found = shares_of_right_answers(
        {
            "sums": {
                "alias": "sums",
                "exact_match,strict": 0.25,
                "exact_match,loose": 0.5,
                "exact_match_stderr,loose": 0.1,
            },
            "quiz": {"acc,none": 1.0, "acc_stderr,none": "N/A"},
        }
    )
    assert found == {"sums exact_match (strict)": 0.25, "sums exact_match (loose)": 0.5, "quiz acc": 1.0}
