"""A model for tests of start-up."""

import logging

import pytest

from harness.server_args import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of 4 layers with head_dim 64."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def logging_as_before():
    """Upstream sets up the root logger when it parses a command line."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
