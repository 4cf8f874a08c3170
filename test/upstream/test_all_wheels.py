"""The wheels of all interpreters and machines that the pin has, built on one machine."""

import zipfile

import pytest

from backend import fetch
from backend.pin import Pin


@pytest.fixture
def six(fork, tmp_path):
    """The pin has six wheels, which are in a folder; the fork that pins them, and their names."""
    folder = tmp_path / "folder"
    folder.mkdir()
    sums = {}
    for python in ("cp311", "cp312", "cp313"):
        for machine in ("x86_64", "aarch64"):
            name = f"sglang-1.2.3-{python}-{python}-manylinux_2_34_{machine}.whl"
            with zipfile.ZipFile(fork.wheel) as archive, zipfile.ZipFile(folder / name, "w") as copy:
                for entry in archive.namelist():
                    data = archive.read(entry)
                    copy.writestr(entry, f"Tag: {name[13:-4]}\n" if entry.endswith("/WHEEL") else data)
            sums[name] = fetch.digest(folder / name)
    Pin("1.2.3", "kvtuner.1", sums).save(fork.root)
    return fork, folder, [name.replace("1.2.3", fork.version) for name in sorted(sums)]


def test_wheels_for_all_interpreters_and_machines_are_built_on_one(six):
    fork, folder, names = six
    result = fork.verb("wheels", **{fetch.FIND_LINKS: str(folder), fetch.WHEEL: ""})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"dist/{name}" for name in names]
    for name in names:
        with zipfile.ZipFile(fork.root / "dist" / name) as archive:
            assert (
                archive.read(f"sglang-{fork.version}.dist-info/WHEEL").decode()
                == f"Tag: {name.split('-', 2)[2][:-4]}\n"
            )
            assert "text.upper()" in archive.read("sglang/greet.py").decode()


def test_one_upstream_wheel_is_not_enough_for_all(six):
    fork, _, _ = six
    result = fork.verb("wheels")
    assert result.returncode == 1
    assert f"{fetch.WHEEL} names one file, but 6 upstream wheels are needed; name a folder" in result.stderr
