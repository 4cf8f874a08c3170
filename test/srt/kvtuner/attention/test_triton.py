"""The Triton kernels without a GPU: Triton's interpreter runs them, in processes that set it before triton is imported."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.chosen import chosen_values

HERE = Path(__file__).parent
ROOT = HERE.parents[3]

# By file: which of its tests, and how many there are at least.
SUITES = {
    "test_kernels.py": ("triton", 100),
    "test_triton_steps.py": ("", 10),
    "test_prefill_libraries.py": ("", 10),
    "test_nonfinite.py": ("triton and (packed_bytes and 16 or counted)", 3),
}


@pytest.fixture(scope="module")
def results(request):
    """By file, what its process will have printed. All that were chosen run at once, on a core each: the interpreter has one
    thread."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file, SUITES[file][0]) for file in chosen_values(request, "file")}


def run(file, choice):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), "-k", choice],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


@pytest.mark.parametrize("file", SUITES)
def test_in_the_interpreter(results, file):
    done = results[file].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= SUITES[file][1], done.stdout[-1000:]
