"""Trying another release and moving the pin: what is reported, what stays as it is, what must start first."""

import hashlib

import pytest
from synthetic import UPSTREAM

from backend.pin import Pin

OURS = "from sglang.greet import greet\n\n\ndef ours():\n    return greet(name='us')\n"
NEXT = "1.2.4"


def content(root):
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def using(fork):
    """A fork whose own code calls upstream's function."""
    fork.write("python/sglang/srt/ours.py", OURS)
    assert fork.verb("record").returncode == 0
    return fork


def rebase(fork, *options, version=NEXT):
    return fork.verb("rebase", version, *options, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(fork.wheel.parent))


def next_release(fork, greet=UPSTREAM["sglang/greet.py"], **more):
    fork.make_wheel({**UPSTREAM, "sglang/greet.py": greet, **more}, NEXT)


def test_the_pinned_release_is_clean_and_starts(using):
    before = content(using.root)
    result = rebase(using, version="1.2.3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "edits: 1 ok, 0 review, 0 conflict" in result.stdout
    assert "premises: 1 ok, 0 review, 0 conflict" in result.stdout
    assert "started: HELLO YOU" in result.stdout
    assert content(using.root) == before


@pytest.mark.parametrize("options", [(), ("--write",)])
def test_a_missing_name_is_a_conflict_that_changes_nothing_and_starts_nothing(using, options):
    next_release(using, UPSTREAM["sglang/greet.py"].replace("def greet", "def welcome"))
    using.edit()  # no edit is in the way
    (using.root / "python/upstream/edits/greet.py.toml").unlink()
    before = content(using.root)
    result = rebase(using, *options)
    assert result.returncode == 1
    assert "conflict  sglang.greet:greet: missing (used by srt/ours.py)" in result.stdout
    assert "stays at 1.2.3" in result.stderr and "Starting" not in result.stdout
    assert content(using.root) == before


def test_a_changed_signature_is_a_review_with_upstreams_diff(using):
    next_release(using, UPSTREAM["sglang/greet.py"].replace("(name)", "(name, loudly=False)"))
    result = rebase(using)
    assert result.returncode == 1 and "review  sglang.greet:greet: changed (used by srt/ours.py)" in result.stdout
    assert "=== sglang.greet:greet\n" in result.stdout and "=== louder\n" in result.stdout
    assert "-def greet(name):\n+def greet(name, loudly=False):" in result.stdout
    assert "started" in result.stdout


def test_an_argument_that_own_code_passes_and_that_is_gone_is_a_conflict(using):
    next_release(using, UPSTREAM["sglang/greet.py"].replace("name", "who"))
    result = rebase(using)
    assert "conflict  sglang.greet:greet: takes no name" in result.stdout


def test_a_moved_pin_builds_only_once_all_reviews_are_recorded(using, tmp_path):
    next_release(using, UPSTREAM["sglang/greet.py"].replace("(name)", "(name, loudly=False)"))
    result = rebase(using, "--write")
    assert result.returncode == 1 and "pin.toml is at 1.2.4" in result.stdout
    assert Pin.load(using.root).version == NEXT
    using.wheel = using.wheel.with_name(using.wheel.name.replace("1.2.3", NEXT))
    build = using.hook("build_wheel", tmp_path / "out")
    assert build.returncode == 1 and "was reviewed on 1.2.3, the pin is 1.2.4" in build.stderr
    assert using.verb("record", "louder").returncode == 1
    assert using.hook("build_wheel", tmp_path / "out").returncode == 1
    assert using.verb("record", "sglang.greet:greet").returncode == 0
    assert using.hook("build_wheel", tmp_path / "out").returncode == 0


def test_a_pin_moved_without_findings_has_new_hashes_and_builds(using, tmp_path):
    next_release(using)
    assert rebase(using, "--write").returncode == 0
    moved = Pin.load(using.root)
    assert (moved.version, moved.local) == (NEXT, "kvtuner.1")
    (name,) = moved.sha256
    using.wheel = using.wheel.with_name(name)
    assert moved.sha256[name] == hashlib.sha256(using.wheel.read_bytes()).hexdigest()
    assert using.hook("build_wheel", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("options", [(), ("--write",)])
def test_a_release_that_does_not_start_keeps_the_pin(using, options):
    next_release(using, **{"sglang/__init__.py": "raise RuntimeError('not today')\n"})
    before = content(using.root)
    result = rebase(using, *options)
    assert result.returncode == 1 and "premises: 1 ok" in result.stdout
    assert "It did not start" in result.stdout and "not today" in result.stderr
    assert ("was not seen to start on 1.2.4" in result.stderr) == bool(options)
    assert content(using.root) == before


def test_an_environment_that_lacks_requirements_claims_nothing(using):
    using.write("python/upstream/start.py", "print('this environment lacks torch')\nraise SystemExit(3)\n")
    next_release(using)
    result = rebase(using, "--write")
    assert result.returncode == 1 and "Not started: nothing is claimed" in result.stdout
    assert Pin.load(using.root).version == "1.2.3"


def test_rebase_names_a_release_that_is_not_there(fork):
    result = rebase(fork, version="9.9")
    assert result.returncode == 1 and "of 9.9: No matching distribution" in result.stderr
    assert "Traceback" not in result.stderr


def test_record_refuses_an_id_that_nothing_has(fork):
    result = fork.verb("record", "loudre")
    assert result.returncode == 1 and "no edit or premise is called loudre" in result.stderr


def test_releases_lists_what_the_index_has_above_the_pin(fork):
    for version in ("1.2.2", "1.2.10", "1.3.0"):
        fork.make_wheel(UPSTREAM, version)
    folder = fork.root.parent / "index" / "sglang"
    folder.mkdir(parents=True)
    links = "".join(f'<a href="{path.as_uri()}">{path.name}</a>\n' for path in fork.wheel.parent.glob("*.whl"))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>\n{links}</body></html>\n")
    index = folder.parent.as_uri()
    result = fork.verb("releases", PIP_INDEX_URL=index, PIP_CONFIG_FILE="/dev/null")
    assert result.returncode == 0, result.stderr
    assert "is at 1.2.3; newer releases: 1.2.10, 1.3.0\nNext: make rebase VERSION=1.3.0" in result.stdout


def test_releases_says_why_an_index_has_none(fork):
    result = fork.verb("releases", PIP_NO_INDEX="1", PIP_CONFIG_FILE="/dev/null")
    assert result.returncode == 1 and "pip lists no releases: " in result.stderr
