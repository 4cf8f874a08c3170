"""When the environment is installed again, and what of it."""

import json

import pytest

import setup_venv


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """A small repository and the pip commands that bringing it up to date runs, by what is installed."""
    for name, text in {
        "pyproject.toml": "fork",
        "python/upstream/pin.toml": "pin",
        "python/sglang/own.py": "own",
        "sgl-kernel/portable/pyproject.toml": "kernel",
        "sgl-kernel/portable/sgl_kernel/__init__.py": "init",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(setup_venv, "ROOT", tmp_path)
    monkeypatch.setattr(setup_venv, "KERNEL", tmp_path / "sgl-kernel/portable")
    monkeypatch.setattr(setup_venv, "has_cuda", lambda: False)
    ran = []

    def step(what, command, log_path):
        if "venv" in command:
            (tmp_path / "env" / "bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / "env" / "bin" / "python").touch()
        ran.append(command)

    monkeypatch.setattr(setup_venv, "_step", step)

    def bring_up_to_date():
        ran.clear()
        setup_venv.set_up(tmp_path / "env", tmp_path / "log")
        return [command[command.index("install") + 3 :] for command in ran if "install" in command]

    return tmp_path, bring_up_to_date


def test_the_first_run_resolves_everything_at_once(steps):
    root, bring_up_to_date = steps
    assert bring_up_to_date() == [
        ["--upgrade", "pip"],
        [str(root / "sgl-kernel/portable"), str(root), *setup_venv.TOOLS],
    ]
    assert bring_up_to_date() == []


def test_with_a_gpu_the_published_kernels_stay(steps, monkeypatch):
    root, bring_up_to_date = steps
    monkeypatch.setattr(setup_venv, "has_cuda", lambda: True)
    assert bring_up_to_date()[-1] == [str(root), *setup_venv.TOOLS]
    (root / "sgl-kernel/portable/sgl_kernel/__init__.py").write_text("changed")
    assert bring_up_to_date() == []


@pytest.mark.parametrize(
    "changed, installed",
    [("python/sglang/own.py", "."), ("sgl-kernel/portable/sgl_kernel/__init__.py", "sgl-kernel/portable")],
)
def test_a_changed_file_installs_only_its_wheel(steps, changed, installed):
    root, bring_up_to_date = steps
    bring_up_to_date()
    (root / changed).write_text("changed")
    assert bring_up_to_date() == [["--no-deps", "--force-reinstall", str((root / installed).resolve())]]


def test_another_pin_resolves_everything_again(steps):
    root, bring_up_to_date = steps
    bring_up_to_date()
    (root / "python/upstream/pin.toml").write_text("another")
    assert bring_up_to_date() == [[str(root / "sgl-kernel/portable"), str(root), *setup_venv.TOOLS]]


def test_another_tool_is_installed_alone(steps, monkeypatch):
    _, bring_up_to_date = steps
    bring_up_to_date()
    monkeypatch.setattr(setup_venv, "TOOLS", ("pytest", "another"))
    assert bring_up_to_date() == [["pytest", "another"]]


def test_leftovers_of_builds_change_nothing(steps):
    root, bring_up_to_date = steps
    bring_up_to_date()
    (root / "python/sglang/__pycache__").mkdir()
    (root / "python/sglang/__pycache__/own.cpython-311.pyc").write_bytes(b"x")
    assert bring_up_to_date() == []


def test_an_interrupted_run_starts_over(steps, monkeypatch):
    root, bring_up_to_date = steps
    bring_up_to_date()
    (root / "python/sglang/own.py").write_text("changed")

    def fail(*unused):
        raise setup_venv.SetupError("no network")

    with monkeypatch.context() as broken:
        broken.setattr(setup_venv, "_step", fail)
        with pytest.raises(setup_venv.SetupError):
            setup_venv.set_up(root / "env", root / "log")
    assert bring_up_to_date()[-1] == [str(root / "sgl-kernel/portable"), str(root), *setup_venv.TOOLS]


def test_a_failed_step_shows_the_end_of_its_log(tmp_path):
    command = ["sh", "-c", "echo cannot resolve; exit 2"]
    with pytest.raises(setup_venv.SetupError, match="(?s)installing failed with exit status 2.*cannot resolve"):
        setup_venv._step("installing", command, tmp_path / "log")


def test_an_unreadable_stamp_counts_as_none(tmp_path):
    (tmp_path / "stamp").write_text("{")
    assert setup_venv._read(tmp_path / "stamp") == {}
    (tmp_path / "stamp").write_text(json.dumps({"fork": "x"}))
    assert setup_venv._read(tmp_path / "stamp") == {"fork": "x"}
