"""The build hooks as a front end calls them, and as pip does."""

import tarfile
import zipfile

import pytest
from packaging.metadata import Metadata
from synthetic import EDIT


def pip(fork, *arguments, **variables):
    """pip with what the build needs taken from the running environment, so that no index is asked."""
    options = ("--no-build-isolation", "--no-deps", "--disable-pip-version-check")
    return fork.python("-m", "pip", *arguments, *options, **variables)


def only(folder):
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_metadata_can_be_had_without_a_build(fork, tmp_path, kind):
    assert fork.hook(f"prepare_metadata_for_build_{kind}", tmp_path / "meta").returncode == 0
    assert fork.hook(f"build_{kind}", tmp_path / "out").returncode == 0
    info = only(tmp_path / "meta")
    with zipfile.ZipFile(only(tmp_path / "out")) as archive:
        for path in info.rglob("*"):
            if path.is_file():
                assert archive.read(path.relative_to(tmp_path / "meta").as_posix()) == path.read_bytes()
    version = fork.version + {"wheel": "", "editable": ".editable"}[kind]
    assert f"\nVersion: {version}\n" in (info / "METADATA").read_text()
    assert not (info / "RECORD").exists()


def test_an_editable_tree_links_the_own_files(fork, tmp_path):
    assert fork.hook("build_editable", tmp_path / "out").returncode == 0
    with zipfile.ZipFile(only(tmp_path / "out")) as archive:
        tree = fork.root / archive.read("__editable__.sglang.pth").decode().strip()
        assert {name.split("/")[0] for name in archive.namelist()} == {
            "__editable__.sglang.pth",
            f"sglang-{fork.version}.editable.dist-info",
        }
    assert tree.parent == fork.root / "build/editable"
    assert (tree / "sglang/srt/ours.py").resolve() == fork.root / "python/sglang/srt/ours.py"
    assert not (tree / "sglang/greet.py").is_symlink()
    assert [path.name for path in tree.iterdir()] == ["sglang"]


def test_a_second_editable_build_replaces_the_tree(fork, tmp_path):
    fork.hook("build_editable", tmp_path / "out")
    tree = only(fork.root / "build/editable")
    fork.write("python/sglang/more.py", "")
    fork.hook("build_editable", tmp_path / "out")
    assert only(fork.root / "build/editable") == tree
    assert (tree / "sglang/more.py").is_symlink()


def test_a_failed_editable_build_keeps_the_old_tree(fork, tmp_path):
    fork.hook("build_editable", tmp_path / "out")
    tree = only(fork.root / "build/editable")
    fork.edit({**EDIT, "anchor": "nothing()"})
    assert fork.hook("build_editable", tmp_path / "out").returncode == 1
    assert only(fork.root / "build/editable") == tree
    assert "upper" in (tree / "sglang/greet.py").read_text()


def test_a_source_archive_holds_the_repository_and_builds_the_same_wheel(fork, tmp_path):
    (fork.root / "PKG-INFO").write_text("")  # as in an unpacked archive: no git is asked
    assert fork.hook("build_sdist", tmp_path / "sdist").returncode == 0
    with tarfile.open(only(tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    folder = only(tmp_path / "unpacked")
    assert folder.name == f"sglang-{fork.version}"
    about = Metadata.from_email((folder / "PKG-INFO").read_bytes())
    assert str(about.version) == fork.version and {"license-expression", "license-file"} < set(about.dynamic)
    assert not list(folder.rglob("greet.py"))
    assert fork.hook("build_wheel", tmp_path / "one").returncode == 0
    fork.root = folder
    assert fork.hook("build_wheel", tmp_path / "two").returncode == 0
    assert only(tmp_path / "one").read_bytes() == only(tmp_path / "two").read_bytes()


def test_two_source_archives_have_the_same_bytes(fork, tmp_path):
    (fork.root / "PKG-INFO").write_text("")
    for name in "ab":
        fork.hook("build_sdist", tmp_path / name)
    assert only(tmp_path / "a").read_bytes() == only(tmp_path / "b").read_bytes()


def test_pip_installs_the_wheel_and_the_editable_tree(fork, tmp_path):
    for number, option in enumerate(([], ["--editable"])):
        target = tmp_path / f"site{number}"
        result = pip(fork, "install", "--target", str(target), *option, ".")
        assert result.returncode == 0, result.stderr
        # Without the running environment's own packages, which may hold an sglang too.
        code = (
            f"import site; site.addsitedir({str(target)!r}); import importlib.metadata as m;"
            "import sglang.greet as g, sglang.srt.ours as o; print(m.version('sglang'), g.greet('you'), o.NAME)"
        )
        shown = fork.python("-S", "-c", code)
        version = fork.version + (".editable" if option else "")
        assert shown.stdout == f"{version} HELLO YOU ours\n", shown.stderr


def test_pip_shows_the_message_and_no_traceback(fork, tmp_path):
    fork.wheel.write_bytes(b"something else")
    result = pip(fork, "wheel", ".", "-w", str(tmp_path / "out"))
    shown = result.stdout + result.stderr
    assert result.returncode != 0
    assert "error: SGLANG_UPSTREAM_WHEEL: " in shown and "is not the pinned file" in shown
    assert "Traceback" not in shown
