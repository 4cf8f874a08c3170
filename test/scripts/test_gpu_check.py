"""gpu_check.py and gpu_bench.py without a GPU: the small mode, from what a copy to another machine would have, and faults that
each check must see."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_bench
import gpu_check
from gpu_checks import report, sources

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEEDS_GPU = {"compile", "graphs", "fence", "bandwidth", "sanitizer"}


def run(*command, cwd=ROOT, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """A copy of what another machine gets, beside an sglang that must not be imported."""
    folder = tmp_path_factory.mktemp("carried")
    for path in sources.carried_files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    other = folder / "other" / "sglang" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise RuntimeError('an installed sglang was imported')\n")
    return folder


@pytest.fixture(scope="module")
def small_mode(carried):
    found = carried / "found.json"
    done = run("scripts/gpu_check.py", "--interpret", "--json", found, cwd=carried, PYTHONPATH=str(carried / "other"))
    assert found.is_file(), done.stderr[-4000:]
    return done, json.loads(found.read_text())


def test_what_a_machine_needs_is_small(carried):
    size = sum(path.stat().st_size for path in carried.rglob("*") if path.is_file())
    assert size < 64 << 20


def test_the_small_mode_passes_what_it_can_run(small_mode):
    done, found = small_mode
    checks = {check["name"]: check for check in found["checks"]}
    assert tuple(checks) == gpu_check.NAMES
    for name, check in checks.items():
        expected = report.NOT_RUN if name in {*NEEDS_GPU, "prefill"} else report.PASS
        assert check["verdict"] == expected, (name, check["summary"], check["numbers"].get("traceback"))
    assert {checks[name]["summary"] for name in NEEDS_GPU} == {"needs a GPU"}
    assert "extend_attention is not among this repository's files nor in" in checks["prefill"]["summary"]
    assert done.returncode == report.INCOMPLETE
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(checks), "one line for the device, one for each check"
    assert all(line.startswith(checks[name]["verdict"]) for name, line in zip(checks, lines[1:], strict=True))


def test_the_json_says_what_was_checked_where(small_mode):
    _, found = small_mode
    about = found["environment"]
    assert about["sources_sha256"] == sources.digest()
    assert (
        about["torch"] and about["triton"] and about["date"] and about["device"]["name"].startswith("Triton's interp")
    )
    numbers = {check["name"]: check["numbers"] for check in found["checks"]}
    assert all(0 < case["row_error"] <= case["tolerance"] for case in numbers["attend"]["cases"])
    assert max(pool["bytes"] for pool in numbers["pools"]["pools"]) > 1 << 32


def test_prefill_runs_with_an_unpacked_sglang():
    upstream = Path(importlib.util.find_spec("sglang").origin).parents[1]
    done = run("scripts/gpu_check.py", "--interpret", "--only", "prefill", "--upstream", upstream)
    assert done.returncode == report.PASSED, done.stdout + done.stderr[-2000:]
    assert "Triton, one pass, Triton, rounds" in done.stdout


@pytest.fixture(scope="module")
def planted():
    """Verdict and summary of a check by fault, from one process."""
    done = run(HERE / "gpu_check_faults.py", TRITON_INTERPRET="1", PYTHONPATH=str(ROOT / "scripts"))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "fault, summary",
    [
        ("compile: spills", "spills 4 registers"),
        ("compile: more shared memory than there is", "wants 4096 bytes of shared memory, the device has 1024"),
        ("pack: a wrong byte", "1 bytes differ"),
        ("pack: a kernel that raises", "RuntimeError: no such kernel"),
        ("attend: another scaling", "of its norm"),
        ("attend: ring starts ignored", "the plan's packed_end"),
        ("attend: a ring row not stored", "the K ring of layer 0 differ"),
        ("pools: a byte behind the pages", "1 guard bytes around the buffers were written"),
        ("slots: ring starts ignored", "the next owner"),
        ("graphs: inputs frozen at capture", "outputs differ from the eager step's"),
        ("fence: layers that read the table late", "when the request table was overwritten"),
        ("fence: nobody overwrites", "the race was not run"),
    ],
)
def test_a_planted_fault_turns_the_check_red(planted, fault, summary):
    found = planted[fault]
    assert found["status"] == report.FAILED and found["verdict"] == report.FAIL, found
    assert summary in found["summary"]


@pytest.mark.parametrize("name", ["compile", "graphs", "fence", "bandwidth"])
def test_what_needs_a_gpu_runs_through_its_code_on_a_cpu(planted, name):
    """With a function that runs again in a graph's place."""
    assert planted[f"{name}: no fault"]["verdict"] == report.PASS, planted[f"{name}: no fault"]


def test_the_benchmark_runs_through_its_code_on_a_cpu(planted):
    found = planted["benchmark"]
    (reading,), (stack,) = found["attention"], found["stacks"]
    assert reading["splits"] == 1 and reading["chosen_by_kernels"]
    assert set(reading["samples"]) == {"attend", "store", "store and pack"}
    assert stack["layers"] == 1 and len(stack["samples"]["graph"]) == 1
    # 80 tokens with a window of 32: 2 packed pages of 16, and 47 ring rows of 96 elements, 4 bytes each, all for K and V.
    block = 16 * 96 * 4 // 8
    assert reading["bytes"] == 2 * (block + 96 * 4) + 2 * (block + 96 * 2) + 2 * 47 * 96 * 4
    assert found["copy_bytes_per_second"] > 0 and not found["left_out"]


def test_a_machine_without_a_gpu_is_told():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("scripts/gpu_bench.py")
    assert done.returncode == report.INCOMPLETE and done.stderr.startswith("not run: torch finds no GPU"), done


def test_a_check_runs_alone_and_a_process_that_dies_is_a_fault(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = gpu_check.run_alone("fence", gpu_check.parse(["--interpret"]))
    assert (found.verdict, found.summary) == (report.NOT_RUN, "needs a GPU")
    monkeypatch.setattr(gpu_check, "__file__", str(HERE / "no_such_program.py"))
    died = gpu_check.run_alone("fence", gpu_check.parse(["--interpret"]))
    assert died.verdict == report.FAIL and "its process ended with 2" in died.summary


@pytest.mark.parametrize("status", [0, 86, 3])
def test_the_sanitizer_runs_over_three_checks(tmp_path, monkeypatch, status):
    from gpu_checks import sanitizer

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho ========= Error: out of bounds\necho $@\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = report.run("sanitizer", lambda findings: sanitizer.check(None, findings))
    assert found.verdict == (report.FAIL if status else report.PASS)
    if status:
        reason = "found errors" if status == sanitizer.ERRORS else "ended with status 3"
        assert f"memcheck of pack {reason}: ========= Error: out of bounds" in found.summary
    runs = found.numbers["runs"]
    assert [(run["tool"], run["check"]) for run in runs] == [(t, c) for t in sanitizer.TOOLS for c in sanitizer.CHECKS]
    assert all(f"--in-process --small --only {run['check']}" in run["output"] for run in runs)


def test_without_the_sanitizer_the_check_says_so(tmp_path, monkeypatch):
    from gpu_checks import sanitizer

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer, "_PLACES", ())
    found = report.run("sanitizer", lambda findings: sanitizer.check(None, findings))
    assert found.verdict == report.NOT_RUN and "compute-sanitizer is not on this machine" in found.summary


@pytest.mark.parametrize(
    "module, arguments, environment, message",
    [
        (gpu_check, [], "1", "TRITON_INTERPRET is set: the kernels would not run on the GPU"),
        (gpu_check, ["--upstream", "/nowhere"], "", "--upstream is /nowhere; valid is a folder that contains sglang"),
        (gpu_check, ["--only", "speed"], "", "invalid choice: 'speed'"),
        (gpu_bench, ["--heads", "6", "--kv-heads", "4"], "", "--heads is 6; valid are multiples of --kv-heads, 4"),
        (gpu_bench, ["--batch", "0"], "", "--batch is 0; valid are 1 and more"),
        (gpu_bench, ["--splits", "3"], "", "invalid choice: 3"),
    ],
)
def test_bad_arguments_are_named(module, arguments, environment, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", environment)
    with pytest.raises(SystemExit) as ended:
        module.parse(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_exit_statuses():
    verdicts = {
        report.PASSED: [report.PASS, report.PASS],
        report.INCOMPLETE: [report.PASS, report.NOT_RUN],
        report.FAILED: [report.NOT_RUN, report.FAIL, report.PASS],
    }
    for status, each in verdicts.items():
        assert report.exit_status([report.Result("x", verdict, "", 0.0) for verdict in each]) == status


def test_a_check_that_compares_nothing_fails():
    assert report.run("x", lambda findings: "all well").verdict == report.FAIL


def test_a_part_left_out_is_not_run_and_a_fault_goes_first():
    def check(findings, holds):
        findings.expect(holds, "a fault")
        findings.leave_out("the rest needs 8 GiB")
        return "well"

    found = report.run("x", lambda findings: check(findings, True))
    assert (found.verdict, found.summary) == (report.NOT_RUN, "well; left out: the rest needs 8 GiB")
    assert report.run("x", lambda findings: check(findings, False)).verdict == report.FAIL
