"""The Triton kernels without a GPU: Triton's interpreter runs them, in a process that sets it before triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[3]


@pytest.mark.parametrize(
    "tests, least",
    [
        (("test_kernels.py", "-k", "triton"), 100),
        (("test_triton_steps.py",), 10),
        (("test_nonfinite.py", "-k", "triton and (packed_bytes and 16 or counted)"), 3),
    ],
    ids=lambda value: str(value)[2:14],
)
def test_in_the_interpreter(tests, least):
    file, *choice = tests
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), *choice],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-1000:]
