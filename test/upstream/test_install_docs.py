"""The commands of docs/install.md, run as they stand there, with a small fork in the place of the real one.

What pip would get from a package index comes from a folder, and dependencies are left out.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from synthetic import Fork

from backend.pin import ROOT, Pin

PAGE = (ROOT / "docs/install.md").read_text(encoding="utf-8")


def sections():
    """The page's commands by heading: blocks of lines."""
    found = {}
    for part in re.split(r"(?m)^## ", PAGE)[1:]:
        heading, _, text = part.partition("\n")
        blocks = re.findall(r"(?m)(?:^ {4}\S.*\n)+", text)
        found[heading] = [[line.strip() for line in block.splitlines()] for block in blocks]
    return found


SECTIONS = sections()


class Machine:
    """A checkout of a small fork and an environment without packages, in which the page's commands run."""

    def __init__(self, folder):
        self.fork = Fork(folder / "checkout")
        index, needs = folder / "index", folder / "needs"
        shutil.copytree(self.fork.wheel.parent, index)
        needs.mkdir()
        for name in ("pip", "packaging", "setuptools"):
            link(name, needs)
        wheel_of("packaging", index)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "environment"], check=True)
        self.environment = {
            "PATH": f"{folder / 'environment/bin'}:/usr/bin:/bin",
            "HOME": str(folder),
            "PYTHONPATH": str(needs),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_FIND_LINKS": str(index),
            "PIP_NO_BUILD_ISOLATION": "0",  # which is pip's way to say: without isolation
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
        }

    def run(self, command):
        """What a command of the page prints; the release that it names is the small fork's here."""
        command = command.replace(Pin.load().version, "1.2.3")
        result = subprocess.run(
            command,
            shell=True,
            cwd=self.fork.root,
            env=self.environment,
            stdout=-1,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}"
        return result.stdout

    def run_all(self, commands):
        return "".join(self.run(command) for command in commands)

    def installed(self, python="python"):
        """The version that is installed, and a word of the own code where the fork is."""
        code = "import importlib.metadata as m; print(m.version('sglang')); import sglang.srt.ours as o; print(o.NAME)"
        return self.run(f'{python} -c "{code}" 2> /dev/null || true').splitlines()

    def install_older(self):
        """Install the code of before a change; the checkout is of after it."""
        self.fork.write("python/sglang/srt/ours.py", "NAME = 'older'\n")
        self.run("python -m pip install .")
        assert self.installed() == [self.fork.version, "older"]
        self.fork.write("python/sglang/srt/ours.py", "NAME = 'ours'\n")


def link(name, folder):
    """Put an installed distribution, all of its top folders, into ``folder``."""
    distribution = importlib.metadata.distribution(name)
    for top in {path.parts[0] for path in distribution.files if path.suffix != ".pth"} - {"..", "__pycache__"}:
        (folder / top).symlink_to(distribution.locate_file(top))


def wheel_of(name, folder):
    """Write an installed distribution of pure Python as a wheel, as an index would have it."""
    distribution = importlib.metadata.distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-py3-none-any.whl", "w") as archive:
        for path in distribution.files:
            if path.suffix != ".pyc":
                archive.write(path.locate(), path.as_posix())


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_the_page_names_the_pinned_release():
    assert set(re.findall(r"\d+\.\d+\.\d+", PAGE)) == {Pin.load().version}


def test_the_changelog_begins_with_the_release_that_is_built():
    headings = re.findall(r"(?m)^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert headings[0] == Pin.load().release


def test_every_section_with_commands_is_run_here():
    assert [heading for heading, blocks in SECTIONS.items() if blocks] == list(CHECKS)


def with_a_gpu(machine, blocks):
    machine.run_all(*blocks)
    assert machine.installed() == [machine.fork.version, "ours"]


def on_a_cpu(machine, blocks):
    shutil.copytree(ROOT / "sgl-kernel/portable", machine.fork.root / "sgl-kernel/portable")
    machine.run_all(*blocks)
    assert machine.installed(".venv/bin/python") == [machine.fork.version, "ours"]
    shown = machine.run(".venv/bin/python -m pip show --files sglang-kernel")
    assert re.search(r"Version: .*\+cpu\n", shown) and "sgl_kernel/__init__.py" in shown


def which_build(machine, blocks):
    ((command, *rest),) = blocks
    assert command == "sglang kvtuner version"  # needs the real package: test_cli.py of the tuner runs it
    machine.run("python -m pip install .")
    shown = machine.run_all(rest)
    assert f"Version: {machine.fork.version}\n" in shown and "License-Expression: Apache-2.0 AND MIT\n" in shown


def wheels(machine, blocks):
    one, all_of_them = blocks
    machine.run_all(one)
    assert machine.installed() == [machine.fork.version, "ours"]
    (built,) = (machine.fork.root / "dist").iterdir()
    built.unlink()
    machine.run_all(all_of_them)
    assert built.exists()


def upgrade(machine, blocks):
    for block in blocks:
        machine.install_older()
        machine.run_all(block)
        assert machine.installed() == [machine.fork.version, "ours"]


def back_to_upstream(machine, blocks):
    ((uninstall, install),) = blocks
    machine.run("python -m pip install .")
    machine.run(install)
    assert machine.installed() == [machine.fork.version, "ours"], "the page says that this alone does nothing"
    machine.run_all([uninstall, install])
    assert machine.installed() == ["1.2.3"]
    assert "HELLO" not in machine.run("python -c \"import sglang.greet as g; print(g.greet('you'))\"")


def without_a_network(machine, blocks):
    carried, collect, build = blocks
    machine.run_all(carried)
    assert machine.installed() == [machine.fork.version, "ours"]
    machine.run_all(collect)
    shutil.rmtree(machine.environment.pop("PIP_FIND_LINKS"))
    shutil.rmtree(Path(machine.environment["HOME"], ".cache"))
    machine.run_all(build)
    (built,) = (machine.fork.root / "dist").iterdir()
    assert built.name.startswith(f"sglang-{machine.fork.version}-")


def in_place(machine, blocks):
    machine.run_all(*blocks)
    assert machine.installed() == [f"{machine.fork.version}.editable", "ours"]
    machine.fork.write("python/sglang/srt/ours.py", "NAME = 'changed'\n")
    assert machine.installed()[1] == "changed"


CHECKS = {
    "With a GPU": with_a_gpu,
    "On a CPU, without make": on_a_cpu,
    "Which build is it?": which_build,
    "Wheels for other machines": wheels,
    "Upgrade": upgrade,
    "Back to upstream": back_to_upstream,
    "Without a network": without_a_network,
    "In place": in_place,
}


@pytest.mark.parametrize("heading", CHECKS)
def test_the_commands_do_what_the_page_says(machine, heading):
    CHECKS[heading](machine, SECTIONS[heading])
