"""Golden data that live beside the repository, not in it."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def find_shared_data(name):
    """Path of the file or folder ``name`` of the golden data; skips the test where there is none.

    The data are looked for in ``$KVTUNER_TEST_DATA`` and, where that is not set, in ``../shared/data`` beside the
    repository.
    """
    given = os.environ.get("KVTUNER_TEST_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    path = folder / name
    if not path.exists():
        where = "$KVTUNER_TEST_DATA" if given else "../shared/data, and KVTUNER_TEST_DATA is not set"
        pytest.skip(f"golden data {name!r} not found in {where}")
    return path
