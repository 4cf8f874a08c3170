"""Whose the folder of built kernels may be, and builds in it that are not what they were."""

import os
import re
import stat

import pytest

from sglang.kernels.ops.attention.kvtuner import cpu as cpu_ops
from sglang.kernels.ops.attention.kvtuner.kernel_cache import DamagedBuild, KernelCacheRefused, checked


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def build(root, content=b"library", leaf="deps-1"):
    library = root / "sm00/module/build-1" / leaf / "module.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(content)
    return library


def test_a_new_folder_is_its_owners_alone(root):
    previous = os.umask(0o002)
    try:
        with checked(root, "module"):
            library = build(root)
            (root / "file").write_text("")
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(previous)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    made = [root / "file", library, *library.parents[:4]]
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o022 for path in made)
    with checked(root, "module"):
        assert library.exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
@pytest.mark.parametrize("depth", [0, 1, 4, 5])
def test_what_others_can_write_is_refused(root, mode, depth):
    with checked(root, "module"):
        library = build(root)
    path = [library, *library.parents][5 - depth]
    path.chmod(mode)
    message = f"{re.escape(str(path))} of the kernel cache has mode {mode:04o}.*chmod -R go-w.*SGLANG_JIT_CACHE_DIR"
    with pytest.raises(KernelCacheRefused, match=message):
        with checked(root, "module"):
            pytest.fail("loaded")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(root):
    root.mkdir(mode=0o755)
    os.chown(root, 12345, -1)
    with pytest.raises(KernelCacheRefused, match="belongs to user 12345"):
        with checked(root, "module"):
            pytest.fail("loaded")


@pytest.mark.parametrize("content", [b"lib", b"another", b""], ids=["truncated", "foreign", "empty"])
def test_a_build_that_changed_is_removed_and_named(root, content, caplog):
    with checked(root, "module"):
        library, other = build(root), build(root, leaf="deps-2")
    library.write_bytes(content)
    with checked(root, "module"):
        assert not library.parent.exists() and other.exists()
        assert str(library) in caplog.text and str(other) not in caplog.text
        build(root)
    with checked(root, "module"):
        assert library.exists()


def test_a_build_without_a_digest_is_removed(root):
    root.mkdir(mode=0o700)
    library = build(root)
    with checked(root, "module"):
        assert not library.exists()


def test_a_damaged_build_that_cannot_be_removed_is_named(root, monkeypatch):
    with checked(root, "module"):
        library = build(root)
    library.write_bytes(b"lib")
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    with pytest.raises(DamagedBuild, match=re.escape(str(library))):
        with checked(root, "module"):
            pytest.fail("loaded")


def test_kernels_are_not_loaded_from_a_refused_folder(root, monkeypatch):
    root.mkdir()
    root.chmod(0o777)
    monkeypatch.setenv("SGLANG_JIT_CACHE_DIR", str(root))
    cpu_ops.module.cache_clear()
    try:
        with pytest.raises(ValueError, match="mode 0777"):
            cpu_ops.module()
    finally:
        cpu_ops.module.cache_clear()
    assert not any(root.iterdir())
