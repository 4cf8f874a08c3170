"""The fork's metadata, as it is made from upstream's."""

import pytest

from backend import metadata
from backend.errors import ForkError


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("Version: 1.2.3\n", "Version: 1.2.4\n", "is not of version 1.2.3 but of 1.2.4"),
        ("\nVersion: 1.2.3\n", "\n", "is not of version 1.2.3 but of none"),
        ("Metadata-Version: 2.4", "Metadata-Version: 2.1", "has the form 2.1; licences are declared as in 2.4 and 2.5"),
        ("Summary: x", "License-Expression: GPL-3.0-only", "upstream's licence is GPL-3.0-only, not Apache-2.0"),
    ],
)
def test_metadata_that_cannot_be_the_forks_stops_the_build(old, new, told):
    good = "Metadata-Version: 2.4\nName: sglang\nVersion: 1.2.3\nSummary: x\n\ntext"
    metadata.rewrite(good.encode(), "1.2.3", "1.2.3+k.1")
    with pytest.raises(ForkError, match=told):
        metadata.rewrite(good.replace(old, new).encode(), "1.2.3", "1.2.3+k.1")


def test_fields_keep_their_order_and_the_description_its_text(fork, tmp_path):
    assert fork.hook("prepare_metadata_for_build_wheel", tmp_path / "meta").returncode == 0
    text = (tmp_path / "meta" / f"sglang-{fork.version}.dist-info" / "METADATA").read_text()
    assert text == (
        f"Metadata-Version: 2.4\nName: sglang\nVersion: {fork.version}\nSummary: says hello\n"
        "Classifier: Topic :: Greetings\nLicense-File: LICENSE\n"
        "License-Expression: Apache-2.0 AND MIT\nLicense-File: LICENSE.kvtuner\n\nVersion: 1.2.3\n"
    )
