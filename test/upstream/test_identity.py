"""The fork's version: what changes it, and that pip and people can rely on it."""

import shutil
import subprocess

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from synthetic import EDIT, TAG

from backend import identity


def test_the_version_is_upstreams_release_the_forks_and_a_digest(fork):
    assert fork.version == f"1.2.3+kvtuner.1.{identity.digest(fork.root)}"
    assert str(Version(fork.version)) == fork.version
    assert fork.version in SpecifierSet("==1.2.3") and fork.version not in SpecifierSet("===1.2.3")


@pytest.mark.parametrize("hexadecimal", ["0" * 64, "012345678912" + "0" * 52, "00e1" * 16])
def test_no_digest_reads_as_a_number(fork, monkeypatch, hexadecimal):
    class Hash:
        def hexdigest(self):
            return hexadecimal

    monkeypatch.setattr("hashlib.sha256", lambda data: Hash())
    assert str(Version(fork.version)) == fork.version == f"1.2.3+kvtuner.1.x{hexadecimal[:12]}"


CHANGES = {
    "content of an own file": lambda fork: fork.write("python/sglang/srt/ours.py", "NAME = 'other'\n"),
    "another own file": lambda fork: fork.write("python/sglang/srt/more.py", ""),
    "name of an own file": lambda fork: (fork.root / "python/sglang/srt/ours.py").rename(
        fork.root / "python/sglang/x.py"
    ),
    "own file that can be executed": lambda fork: (fork.root / "python/sglang/srt/ours.py").chmod(0o755),
    "a kernel source": lambda fork: fork.write("sgl-kernel/csrc/pack.cu", ""),
    "code of an edit": lambda fork: fork.edit({**EDIT, "code": "text = text.lower()"}),
    "place of an edit": lambda fork: fork.edit({**EDIT, "where": "before"}),
    "upstream file of an edit": lambda fork: fork.edit({**EDIT, "id": "other"}, file="run.py"),
    "no edit": lambda fork: (fork.root / "python/upstream/edits/greet.py.toml").unlink(),
    "licence": lambda fork: fork.write("LICENSE", "ours\n"),
}


def test_what_reaches_the_package_changes_the_digest(fork, tmp_path):
    before = identity.digest(fork.root)
    seen = {before: "nothing"}
    for what, change in CHANGES.items():
        fork.root = shutil.copytree(tmp_path / "fork", tmp_path / what)
        change(fork)
        digest = identity.digest(fork.root)
        assert digest not in seen, f"{what} and {seen.get(digest)} have the same digest"
        seen[digest] = what


def test_what_does_not_reach_the_package_changes_nothing(fork):
    before = fork.version
    fork.edit({**EDIT, "why": "another reason", "fingerprint": "0" * 16})
    for name in ("python/sglang/__pycache__/a.pyc", "python/sglang/b.py~", "docs/readme.md", "test/test_x.py"):
        fork.write(name, "")
    assert fork.version == before


def test_two_edits_that_swap_places_are_told_apart(fork):
    other = {**EDIT, "id": "softer", "code": "text = text.lower()"}
    fork.edit(EDIT, other)
    before = identity.digest(fork.root)
    fork.edit(other, EDIT)
    assert identity.digest(fork.root) != before


def test_a_later_release_is_a_higher_version_whatever_its_digest():
    digests = ("x000000000000", "xffffffffffff")
    ordered = [f"{base}+kvtuner.{n}.{d}" for base in ("0.5.23", "0.5.24") for n in (1, 2, 10) for d in digests]
    assert sorted(ordered, key=Version) == ordered
    assert Version("0.5.23") < Version(ordered[0]) and Version(ordered[5]) < Version("0.5.23.post1")


def test_pip_replaces_a_wheel_by_one_of_other_own_code(fork, tmp_path):
    names = []
    for text in ("NAME = 'first'\n", "NAME = 'second'\n"):
        fork.write("python/sglang/srt/ours.py", text)
        assert fork.hook("build_wheel", tmp_path / "out").returncode == 0
        names.append(f"sglang-{fork.version}-{TAG}.whl")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    fork.python("-m", "venv", "--without-pip", "env")
    # Both ways: the order of two digests means nothing.
    for name in (*names, names[0]):
        install = ("--python", "env/bin/python", "install", "--no-index", "--no-deps", str(tmp_path / "out" / name))
        result = fork.python("-m", "pip", *install)
        assert result.returncode == 0, result.stderr
        code = "import importlib.metadata as m, sglang.srt.ours as o; print(m.version('sglang'), o.NAME)"
        shown = subprocess.check_output([fork.root / "env/bin/python", "-I", "-c", code], text=True)
        assert shown == f"{name.split('-')[1]} {'first' if name == names[0] else 'second'}\n"
    assert len(list((fork.root / "env").rglob("sglang-*.dist-info"))) == 1


def test_the_digest_is_the_same_for_every_interpreter(fork):
    """Nothing in it comes from the interpreter or from the order in which a file system lists names."""
    code = "import sys; sys.path.insert(0, 'python/upstream'); from backend import identity; print(identity.digest())"
    seeds = {fork.python("-c", code, PYTHONHASHSEED=seed).stdout for seed in ("1", "2")}
    assert seeds == {identity.digest(fork.root) + "\n"}
