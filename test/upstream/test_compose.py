"""Composing the tree, own files, and the maintainer's commands."""

import pytest
from synthetic import EDIT, UPSTREAM

from backend import edits, own, review
from backend.errors import ForkError
from backend.pin import Pin


def test_the_real_edits_apply_to_the_real_pin(tree):
    files = review.by_file(tree, edits.load(), Pin.load().release)
    assert [f.detail for file in files for f in file.findings if f.status != review.OK] == []
    assert all(file.data for file in files)


def test_the_real_release_reports_the_forks_version(tree):
    (file,) = [f for f in review.by_file(tree, edits.load(), "9.9.9+x.1") if f.target == "sglang/version.py"]
    assert b'__version__ = "9.9.9+x.1"' in file.data


def test_compose_writes_the_tree(fork, tmp_path):
    result = fork.verb("compose", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"sglang/greet.py", "sglang/srt/ours.py", f"sglang-{fork.version}.dist-info/METADATA"} <= files
    assert "    text = text.upper()\n" in (tmp_path / "out/sglang/greet.py").read_text()


def test_compose_refuses_a_folder_that_is_not_empty(fork, tmp_path):
    result = fork.verb("compose", str(tmp_path))
    assert result.returncode == 1 and "is not an empty folder" in result.stderr


def test_diff_shows_the_edits_and_lists_the_own_files(fork):
    out = fork.verb("diff").stdout
    assert "--- a/sglang/greet.py\n+++ b/sglang/greet.py\n" in out
    assert "+    text = text.upper()\n" in out and "\n-" not in out.replace("\n--- ", "\n")
    assert "  sglang/srt/ours.py\n" in out


def test_check_is_content_with_recorded_edits(fork):
    result = fork.verb("check")
    assert result.returncode == 0 and "edits: 1 ok, 0 review, 0 conflict\n" in result.stdout


def test_a_changed_scope_needs_review_until_it_is_recorded(fork, tmp_path):
    changed = UPSTREAM["sglang/greet.py"].replace("return text", "return text + '!'")
    fork.make_wheel({**UPSTREAM, "sglang/greet.py": changed})
    result = fork.verb("check")
    assert result.returncode == 1 and "review  louder  sglang/greet.py  greet" in result.stdout
    build = fork.hook("build_wheel", tmp_path / "out")
    assert build.returncode == 1 and "needs review" in build.stderr and "edit louder" in build.stderr
    assert not list((tmp_path / "out").iterdir())
    assert fork.verb("record").returncode == 1
    assert fork.verb("record", "louder").returncode == 0
    assert fork.verb("check").returncode == 0


def test_a_moved_anchor_is_a_conflict(fork, tmp_path):
    fork.make_wheel({**UPSTREAM, "sglang/greet.py": "def greet(name):\n    return name\n"})
    result = fork.verb("check")
    assert result.returncode == 1 and "conflict  louder" in result.stdout
    assert fork.verb("record").returncode == 1
    build = fork.hook("build_wheel", tmp_path / "out")
    assert "edit louder: sglang/greet.py, scope greet: the anchor is not there" in build.stderr
    assert not list((tmp_path / "out").iterdir())


def test_an_edit_of_a_file_that_upstream_has_not_is_a_conflict(fork):
    fork.edit(EDIT, file="gone.py")
    (fork.root / "python/upstream/edits/greet.py.toml").unlink()
    result = fork.verb("check")
    assert result.returncode == 1 and "sglang/gone.py, scope greet: upstream has no such file" in result.stdout


def test_an_unrecorded_edit_needs_review(fork):
    fork.edit({**EDIT, "fingerprint": ""})
    result = fork.verb("check")
    assert result.returncode == 1 and "no fingerprint is recorded" in result.stdout


def test_an_own_file_that_upstream_has_too_stops_the_build(fork, tmp_path):
    fork.write("python/sglang/data.json", "[]")
    build = fork.hook("build_wheel", tmp_path / "out")
    assert build.returncode == 1 and "upstream has a file of its own at sglang/data.json" in build.stderr
    assert not list((tmp_path / "out").iterdir())
    check = fork.verb("check")
    assert check.returncode == 1 and "conflict  (own file)  sglang/data.json" in check.stdout


def test_own_files_leave_out_leftovers(fork):
    for name in ("__pycache__/a.cpython-311.pyc", "b.pyc", ".hidden", ".git/c.py", "d.py~", "e.py.orig"):
        fork.write(f"python/sglang/{name}", "")
    assert list(own.find(fork.root)) == ["sglang/srt/ours.py"]


def test_kernel_sources_are_placed_by_suffix(fork):
    sources = ("include/codec.cuh", "include/deep/page.h", "csrc/pack.cu")
    for name in (*sources, "csrc/Makefile", "csrc/notes.md", "python/x.py"):
        fork.write(f"sgl-kernel/{name}", "")
    assert set(own.find(fork.root)) == {
        "sglang/srt/ours.py",
        "sglang/kernels/jit/include/codec.cuh",
        "sglang/kernels/jit/include/deep/page.h",
        "sglang/kernels/jit/csrc/pack.cu",
    }


def test_two_own_files_of_one_name_are_refused(fork):
    fork.write("python/sglang/kernels/jit/csrc/pack.cu", "")
    fork.write("sgl-kernel/csrc/pack.cu", "")
    with pytest.raises(ForkError, match="two own files"):
        own.find(fork.root)
