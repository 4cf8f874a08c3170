"""What the running package says of itself."""

import pytest

from harness.upstream import ROOT
from sglang.srt.kvtuner.config.identity import Identity, identity


def test_a_version_is_taken_apart():
    found = Identity.parse("0.5.23+kvtuner.12.x0123456789ab")
    assert (found.upstream, found.release, found.digest, found.editable) == ("0.5.23", 12, "x0123456789ab", False)
    assert found.describe() == (
        "sglang    0.5.23+kvtuner.12.x0123456789ab\nupstream  0.5.23\nrelease   12\n"
        "digest    x0123456789ab (of own files and edits)"
    )


def test_an_editable_install_says_that_its_files_can_have_changed():
    found = Identity.parse("0.5.23+kvtuner.1.x0123456789ab.editable")
    assert found.editable and found.digest == "x0123456789ab"
    assert found.describe().splitlines()[-1].startswith("editable  own files are links to a checkout")


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23+kvtuner.1", "0.5.23+other.1.x0123456789ab", "0.0.0.dev0"])
def test_a_version_that_is_not_the_forks_is_refused(version):
    with pytest.raises(ValueError, match=f"sglang's version is {version.replace('+', '.')}, which is no version of"):
        Identity.parse(version)


def test_the_build_writes_what_is_read_here(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "python" / "upstream"))
    from backend import identity as built
    from backend.pin import Pin

    pin = Pin.load()
    for editable in (False, True):
        found = Identity.parse(built.version(pin, editable=editable))
        assert (found.upstream, found.digest, found.editable) == (pin.version, built.digest(), editable)
        assert f"kvtuner.{found.release}" == pin.local
    assert identity().upstream == pin.version
