"""Fixtures: a small synthetic fork, and the real pinned release, which the build's own code fetches once."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "python" / "upstream")]

from synthetic import Fork  # noqa: E402

from backend import fetch, hooks, wheel  # noqa: E402
from backend.pin import Pin  # noqa: E402

VARIABLES = (fetch.WHEEL, fetch.FIND_LINKS, fetch.CACHE, "SOURCE_DATE_EPOCH")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """Tests see none of the build's variables; the session's fixtures below, made before them, do."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fork(tmp_path) -> Fork:
    return Fork(tmp_path / "fork")


@pytest.fixture(scope="session")
def upstream(tmp_path_factory) -> Path:
    """The real pinned wheel."""
    pin = Pin.load()
    path = tmp_path_factory.mktemp("pinned") / fetch.select(pin)
    with fetch.fetch(pin) as file:
        path.write_bytes(file.read())
    return path


@pytest.fixture(scope="session")
def tree(upstream, tmp_path_factory) -> Path:
    """The real pinned wheel, unpacked."""
    folder = tmp_path_factory.mktemp("upstream")
    wheel.unpack(upstream, folder)
    return folder


@pytest.fixture(scope="session")
def built(upstream, tmp_path_factory) -> Path:
    """The real fork's wheel."""
    folder = tmp_path_factory.mktemp("built")
    return folder / hooks.build_wheel(str(folder))
