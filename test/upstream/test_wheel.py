"""The wheel that is built: its bytes, its RECORD, its metadata, and what it shares with upstream's."""

import base64
import csv
import hashlib
import io
import zipfile

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

from backend import edits, fetch, hooks, identity, own
from backend.pin import ROOT, Pin
from backend.splice import NOTICE


@pytest.fixture(scope="module")
def archive(built):
    with zipfile.ZipFile(built) as opened:
        yield opened


@pytest.fixture(scope="module")
def info():
    return f"sglang-{identity.version(Pin.load())}.dist-info/"


def upstream_files(tree):
    return {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_file()}


def test_the_name_has_the_forks_version_and_upstreams_tag(built, upstream):
    name, version, _, tags = parse_wheel_filename(built.name)
    assert (name, str(version)) == ("sglang", identity.version(Pin.load()))
    assert tags == parse_wheel_filename(fetch.select(Pin.load()))[3]


def test_record_is_right_for_every_file(archive, info):
    rows = list(csv.reader(io.StringIO(archive.read(f"{info}RECORD").decode())))
    assert [row[0] for row in rows] == archive.namelist()
    for name, digest, size in rows[:-1]:
        data = archive.read(name)
        expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(data)), name
    assert rows[-1] == [f"{info}RECORD", "", ""]


def test_the_metadata_differs_from_upstreams_in_version_licences_and_addresses_only(archive, info, tree):
    pin = Pin.load()
    theirs = Metadata.from_email((tree / f"sglang-{pin.version}.dist-info/METADATA").read_bytes(), validate=False)
    ours = Metadata.from_email(archive.read(f"{info}METADATA"))
    assert ours.license_expression == "Apache-2.0 AND MIT"
    assert (str(ours.version), str(theirs.version)) == (identity.version(pin), pin.version)
    assert ours.license_files == [*theirs.license_files, "LICENSE.kvtuner"]
    assert ours.classifiers == [value for value in theirs.classifiers if not value.startswith("License ::")]
    assert theirs.license and theirs.project_urls  # or there would be nothing to leave out
    assert (ours.license, ours.project_urls, ours.home_page, ours.download_url) == (None, None, None, None)
    for field in ("name", "summary", "requires_dist", "provides_extra", "requires_python", "description", "author"):
        assert getattr(ours, field) == getattr(theirs, field), field


def test_the_licences_are_all_there(archive, info, tree):
    theirs = tree / f"sglang-{Pin.load().version}.dist-info/licenses/LICENSE"
    assert archive.read(f"{info}licenses/LICENSE") == theirs.read_bytes()
    assert archive.read(f"{info}licenses/LICENSE.kvtuner") == (ROOT / "LICENSE").read_bytes()
    declared = Metadata.from_email(archive.read(f"{info}METADATA")).license_files
    assert {name for name in archive.namelist() if "/licenses/" in name} == {f"{info}licenses/{d}" for d in declared}


def test_all_other_upstream_files_are_unchanged(archive, info, tree):
    touched = {edit.target for edit in edits.load()}
    old = f"sglang-{Pin.load().version}.dist-info/"
    for name, path in upstream_files(tree).items():
        if name in touched or name in (f"{old}METADATA", f"{old}RECORD"):
            continue
        assert archive.read(name.replace(old, info)) == path.read_bytes(), name


def test_nothing_but_upstreams_and_the_own_files_is_there(archive, info, tree):
    old = f"sglang-{Pin.load().version}.dist-info/"
    expected = {name.replace(old, info) for name in upstream_files(tree)} | set(own.find())
    assert set(archive.namelist()) == expected | {f"{info}licenses/LICENSE.kvtuner"}


def test_edited_files_only_gain_lines_and_carry_the_notice(archive, tree):
    touched = {edit.target for edit in edits.load()}
    assert touched
    for name in touched:
        lines = archive.read(name).splitlines(keepends=True)
        assert any(line.startswith(NOTICE) for line in lines[:3]), name
        rest = iter(lines)
        assert all(line in rest for line in (tree / name).read_bytes().splitlines(keepends=True)), name


def test_own_files_are_there(archive):
    for name, path in own.find().items():
        assert archive.read(name) == path.read_bytes(), name


def test_a_second_build_has_the_same_bytes(built, upstream, tmp_path, monkeypatch):
    monkeypatch.setenv(fetch.WHEEL, str(upstream))
    assert fetch.digest(tmp_path / hooks.build_wheel(str(tmp_path))) == fetch.digest(built)


@pytest.mark.parametrize("epoch", [{}, {"SOURCE_DATE_EPOCH": "1700000000"}])
def test_equal_sources_give_equal_bytes(fork, tmp_path, epoch):
    for name in "ab":
        assert fork.hook("build_wheel", tmp_path / name, **epoch).returncode == 0
        fork.write("python/sglang/srt/ours.py", (fork.root / "python/sglang/srt/ours.py").read_text())
    (first,), (second,) = (list((tmp_path / name).iterdir()) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("epoch, moment", [(None, (1980, 1, 1)), ("1700000000", (2023, 11, 14)), ("0", (1980, 1, 1))])
def test_file_times_follow_source_date_epoch(fork, tmp_path, epoch, moment):
    fork.hook("build_wheel", tmp_path / "out", **({"SOURCE_DATE_EPOCH": epoch} if epoch else {}))
    (path,) = (tmp_path / "out").iterdir()
    assert {entry.date_time[:3] for entry in zipfile.ZipFile(path).infolist()} == {moment}


def test_order_and_permissions_are_fixed(fork, tmp_path):
    fork.write("python/sglang/tool.sh", "").chmod(0o777)
    fork.hook("build_wheel", tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()
    entries = zipfile.ZipFile(path).infolist()
    names = [entry.filename for entry in entries]
    split = [name.startswith("sglang-") for name in names].index(True)
    assert names[:split] == sorted(names[:split]) and names[split:-1] == sorted(names[split:-1])
    assert names[-1].endswith("/RECORD")
    executable = {entry.filename for entry in entries if entry.external_attr >> 16 == 0o100755}
    assert executable == {"sglang/run.sh", "sglang/tool.sh"}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100755, 0o100644}
