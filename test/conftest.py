"""Fixtures for all tests; what they do is in the ``harness`` package."""

import functools
import itertools

import pytest

import harness


@pytest.fixture(scope="session")
def shared_data():
    """Call with a name to get the path of golden data; skips where they are absent."""
    return harness.find_shared_data


@pytest.fixture(scope="session")
def smollm2_checkpoint():
    """Folder of the SmolLM2-135M-Instruct checkpoint."""
    return harness.smollm2()


@pytest.fixture(scope="session")
def random_llama():
    """Call with a shape to get the folder of a small random Llama checkpoint."""
    return harness.random_llama


@pytest.fixture
def launch_server(tmp_path):
    """``harness.launch_server`` with log files in the test's temporary folder."""
    numbers = itertools.count(1)

    @functools.wraps(harness.launch_server)
    def launch(model, *flags, **options):
        options.setdefault("log_path", tmp_path / f"server-{next(numbers)}.log")
        return harness.launch_server(model, *flags, **options)

    return launch
