"""Getting the pinned wheel: from a file, a folder, the cache, or pip."""

import hashlib
import subprocess
import sys
import zipfile
from io import BytesIO

import pytest
from packaging.tags import Tag
from synthetic import TAG, UPSTREAM

from backend import fetch
from backend import wheel as wheels
from backend.errors import ForkError
from backend.pin import Pin

NAME = f"sglang-1.2.3-{TAG}.whl"
OTHER = "sglang-1.2.3-cp399-cp399-manylinux_2_34_x86_64.whl"


@pytest.fixture
def wheel(fork):
    """A small upstream wheel that pip accepts."""
    return fork.wheel


@pytest.fixture
def pin(wheel):
    return Pin("1.2.3", "kvtuner.1", {NAME: fetch.digest(wheel), OTHER: "0" * 64})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(fetch.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(wheel, monkeypatch):
    """pip sees the wheel's folder and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel.parent


def failure(pin):
    with pytest.raises(ForkError) as caught:
        fetch.fetch(pin)
    return str(caught.value)


def wrong(pin):
    return Pin(pin.version, pin.local, {NAME: "f" * 64})


def test_the_wheel_for_the_interpreter_is_selected(pin):
    assert fetch.select(pin) == NAME
    assert fetch.select(pin, [Tag("cp399", "cp399", "manylinux_2_34_x86_64")]) == OTHER


def test_no_wheel_for_the_interpreter_names_the_tag_and_the_pinned_ones(pin):
    with pytest.raises(ForkError) as caught:
        fetch.select(pin, [Tag("cp310", "cp310", "manylinux_2_34_x86_64"), Tag("py3", "none", "any")])
    message = str(caught.value)
    assert "cp310-cp310-manylinux_2_34_x86_64" in message
    assert NAME in message and OTHER in message


@pytest.mark.parametrize("python", ["cp311", "cp312", "cp313"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_real_pin_has_a_wheel_for_every_supported_platform(python, machine):
    pin = Pin.load()
    name = fetch.select(pin, [Tag(python, python, f"manylinux_2_34_{machine}")])
    assert name.startswith(f"sglang-{pin.version}-{python}-") and len(pin.sha256[name]) == 64


def test_a_given_file_is_used(pin, wheel, monkeypatch):
    monkeypatch.setenv(fetch.WHEEL, str(wheel))
    assert fetch.fetch(pin).read() == wheel.read_bytes()


def test_a_given_folder_is_used(pin, wheel, monkeypatch):
    monkeypatch.setenv(fetch.FIND_LINKS, str(wheel.parent))
    assert fetch.fetch(pin).read() == wheel.read_bytes()


@pytest.mark.parametrize("variable", [fetch.WHEEL, fetch.FIND_LINKS])
def test_a_wrong_hash_names_the_file_and_both_hashes(pin, wheel, monkeypatch, variable):
    monkeypatch.setenv(variable, str(wheel if variable == fetch.WHEEL else wheel.parent))
    message = failure(wrong(pin))
    assert NAME in message and f"expected {'f' * 64}" in message and f"got      {fetch.digest(wheel)}" in message


def replace_file(path, content):
    other = path.with_suffix(".other")
    other.write_bytes(content)
    other.replace(path)


def overwrite_file(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize("swap", [replace_file, overwrite_file])
@pytest.mark.parametrize("origin", [fetch.WHEEL, fetch.FIND_LINKS, fetch.CACHE])
def test_what_was_hashed_is_what_is_unpacked(pin, wheel, cache, index, tmp_path, monkeypatch, origin, swap):
    """Also where somebody puts another file in its place in between."""
    if origin == fetch.CACHE:
        fetch.fetch(pin)
    else:
        monkeypatch.setenv(origin, str(wheel if origin == fetch.WHEEL else wheel.parent))
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("sglang/__init__.py", "swapped in")
    upstream = fetch.fetch(pin)
    swap(cache / NAME if origin == fetch.CACHE else wheel, file.getvalue())
    wheels.unpack(upstream, tmp_path / "tree")
    assert (tmp_path / "tree/sglang/__init__.py").read_text() == UPSTREAM["sglang/__init__.py"]


@pytest.mark.parametrize("variable", [fetch.WHEEL, fetch.FIND_LINKS])
def test_a_missing_file_is_named(pin, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    message = failure(pin)
    assert "nowhere" in message and NAME in message and variable in message


def test_pip_fills_the_cache(pin, cache, index):
    assert fetch.fetch(pin).read() == (index / NAME).read_bytes()
    assert [path.name for path in cache.iterdir()] == [NAME]


def test_pip_fetches_the_wheel_of_another_interpreter_and_machine(pin, cache, index):
    other = "sglang-1.2.3-cp312-cp312-manylinux_2_34_aarch64.whl"
    (index / NAME).rename(index / other)
    pin = Pin(pin.version, pin.local, {**pin.sha256, other: pin.sha256[NAME]})
    assert fetch.fetch(pin, other).read() == (index / other).read_bytes()
    assert [path.name for path in cache.iterdir()] == [other]


def test_the_cache_is_used_without_pip(pin, cache, index, monkeypatch):
    fetch.fetch(pin)
    monkeypatch.setattr(fetch, "pip_download", None)
    assert fetch.fetch(pin).read() == (cache / NAME).read_bytes()


def test_a_damaged_cached_file_is_fetched_again(pin, cache, index):
    fetch.fetch(pin)
    (cache / NAME).write_bytes(b"damaged")
    assert fetch.fetch(pin).read() == (index / NAME).read_bytes()
    assert fetch.digest(cache / NAME) == pin.sha256[NAME]


def test_pip_finding_another_file_is_the_same_error(pin, cache, index):
    message = failure(wrong(pin))
    digest = fetch.digest(index / NAME)
    assert NAME in message and f"expected {'f' * 64}" in message and f"got      {digest}" in message
    assert list(cache.iterdir()) == []


def test_pip_finding_nothing_says_what_else_can_be_done(pin, cache, index):
    (index / NAME).unlink()
    message = failure(pin)
    assert "No matching distribution" in message and fetch.WHEEL in message and fetch.FIND_LINKS in message


def test_constraints_of_the_user_do_not_stop_the_download(pin, cache, index, tmp_path, monkeypatch):
    (tmp_path / "constraints.txt").write_text("sglang<1\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    assert fetch.fetch(pin).read() == (cache / NAME).read_bytes()


def test_a_cache_that_cannot_be_made_is_named(pin, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(fetch.CACHE, str(tmp_path / "file" / "cache"))
    assert fetch.CACHE in failure(pin)


def test_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fetch.digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_importing_the_backend_does_no_work(tmp_path):
    """Not even with no home, no cache and no pin to read: front ends import it only to list its hooks."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); from backend import hooks"
    folder = str(fetch.Path(fetch.__file__).parents[1])
    environment = {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, folder], env=environment, cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []
