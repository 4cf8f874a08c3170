"""The format of edits, and recording fingerprints in them."""

import pytest
from synthetic import EDIT

from backend import edits
from backend.errors import ForkError


def write(root, *tables, file="greet.py"):
    path = root / edits.EDITS / f"{file}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(tables), encoding="utf-8")
    return path


def table(**changed):
    fields = {**EDIT, **changed}
    return "[[edit]]\n" + "".join(f"{key} = '''{value}'''\n" for key, value in fields.items() if value is not None)


def failure(root):
    with pytest.raises(ForkError) as caught:
        edits.load(root)
    return str(caught.value)


def test_the_target_mirrors_the_path(tmp_path):
    write(tmp_path, table(), file="srt/layers/a.py")
    (edit,) = edits.load(tmp_path)
    assert (edit.target, edit.id, edit.scope) == ("sglang/srt/layers/a.py", "louder", "greet")


@pytest.mark.parametrize("field", ["id", "scope", "where", "code", "why", "upstream", "drop_when"])
def test_a_missing_field_is_named(tmp_path, field):
    write(tmp_path, table(**{field: None}))
    assert f"missing fields: {field}" in failure(tmp_path)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"extra": "x"}, "unknown fields: extra"),
        ({"id": "Not An Id"}, "the id must be"),
        ({"where": "around"}, "where is 'around'"),
        ({"anchor": None}, "needs an anchor"),
        ({"where": "first"}, "takes no anchor"),
        ({"why": " "}, "empty fields: why"),
        ({"upstream": "none"}, "a link or 'none: reason'"),
        ({"code": "a = 1\n" * 6}, "the code has 6 lines; at most 5"),
        ({"code": "if x:"}, "the code does not parse"),
        ({"code": "    x = 1\n"}, "the code does not parse"),
        ({"code": "# nothing"}, "holds no statement"),
    ],
)
def test_a_broken_edit_is_refused(tmp_path, change, problem):
    write(tmp_path, table(**change))
    message = failure(tmp_path)
    assert problem in message
    assert "sglang/greet.py" in message


def test_five_lines_of_code_are_allowed(tmp_path):
    write(tmp_path, table(code="\n" + "a = 1\n" * 5))
    assert len(edits.load(tmp_path)) == 1


def test_a_field_that_is_no_text_is_refused(tmp_path):
    write(tmp_path, table(why=None) + "why = 3\n")
    assert "not text: why" in failure(tmp_path)


def test_an_id_belongs_to_one_edit(tmp_path):
    write(tmp_path, table(), file="a.py")
    write(tmp_path, table(), file="b.py")
    assert "the id is taken by an edit of sglang/a.py" in failure(tmp_path)


@pytest.mark.parametrize("text", ["", "version = 1\n", "[edit]\nid = 'x'\n"])
def test_a_file_holds_edits_and_nothing_else(tmp_path, text):
    write(tmp_path, text)
    assert "[[edit]] tables" in failure(tmp_path)


def test_a_file_that_is_no_toml_is_named(tmp_path):
    write(tmp_path, "[[edit]\n")
    assert "greet.py.toml" in failure(tmp_path)


def test_record_keeps_the_rest_of_the_text(tmp_path):
    first = "# about it\n" + table(fingerprint="old") + "# behind\n\n"
    path = write(tmp_path, first, table(id="second"))
    before = path.read_text()
    assert edits.record(path, {"louder": "aaaa", "second": "bbbb"}, tmp_path)
    assert path.read_text() == before.replace("'''old'''", '"aaaa"').rstrip() + '\nfingerprint = "bbbb"\n'
    assert [edit.fingerprint for edit in edits.load(tmp_path)] == ["aaaa", "bbbb"]


def test_record_twice_changes_nothing(tmp_path):
    path = write(tmp_path, table())
    edits.record(path, {"louder": "aaaa"}, tmp_path)
    assert not edits.record(path, {"louder": "aaaa"}, tmp_path)


def test_record_leaves_unnamed_edits_alone(tmp_path):
    path = write(tmp_path, table(fingerprint="old"))
    assert not edits.record(path, {"other": "aaaa"}, tmp_path)


def test_record_restores_a_text_that_it_cannot_place_a_line_in(tmp_path):
    path = write(tmp_path, table(code="'''\nfingerprint = 1\n'''".replace("'''", "")))
    before = path.read_text()
    with pytest.raises(ForkError, match="cannot place the fingerprints"):
        edits.record(path, {"louder": "aaaa"}, tmp_path)
    assert path.read_text() == before
