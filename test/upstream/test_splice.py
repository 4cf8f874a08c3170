"""The edit engine: finding a place in small sources and inserting there."""

import pytest

from backend.edits import Edit
from backend.errors import ForkError
from backend.splice import NOTICE, Source

FILE = "sglang/m.py"


def edit(scope="", anchor="", code="added()", where="after", name="e"):
    return Edit(FILE, name, scope, where, code, "why", "none: test", "never", anchor)


def apply(source, *edits):
    """The edited source without its notice."""
    data = source if isinstance(source, bytes) else source.encode()
    text = Source(data, FILE).apply(list(edits), "1.2.3+x.1")
    head, notice, tail = text.partition(NOTICE)
    assert notice and tail[:1] in b"\r\n"
    return (head + tail.removeprefix(b"\r").removeprefix(b"\n")).decode()


def failure(source, *edits):
    with pytest.raises(ForkError) as caught:
        apply(source, *edits)
    return str(caught.value)


FUNCTION = """\
def f(a):
    '''Doc.'''
    # comment
    x = g( a,
           "é")  # trailing ü

    return x
"""


def test_after_a_statement():
    expected = FUNCTION.replace("trailing ü\n", "trailing ü\n    # kvtuner edit: e\n    added()\n")
    assert apply(FUNCTION, edit("f", "x = g(a, 'é')")) == expected


def test_before_a_statement():
    expected = FUNCTION.replace("    x = g", "    # kvtuner edit: e\n    added()\n    x = g")
    assert apply(FUNCTION, edit("f", "x = g(a, 'é')", where="before")) == expected


def test_first_goes_below_the_docstring():
    expected = FUNCTION.replace("'''\n", "'''\n    # kvtuner edit: e\n    added()\n")
    assert apply(FUNCTION, edit("f", where="first")) == expected


def test_last_goes_to_the_end():
    assert apply(FUNCTION, edit("f", where="last")) == FUNCTION + "    # kvtuner edit: e\n    added()\n"


def test_first_in_a_module_goes_below_future_imports():
    source = '"""Doc."""\nfrom __future__ import annotations\nimport os\n'
    expected = source.replace("import os", "# kvtuner edit: e\nadded()\nimport os")
    assert apply(source, edit(where="first")) == expected


def test_first_without_a_docstring():
    assert apply("x = 1\n", edit(where="first")) == "# kvtuner edit: e\nadded()\nx = 1\n"


def test_an_empty_module_takes_an_edit():
    assert apply("", edit(where="last")) == "# kvtuner edit: e\nadded()\n"


def test_before_goes_above_decorators():
    source = "class C:\n    @a\n    @b(\n        1)\n    def m(self): pass\n"
    expected = source.replace("    @a", "    # kvtuner edit: e\n    added()\n    @a")
    assert apply(source, edit("C", "def m(self):", where="before")) == expected


def test_a_header_anchor_stands_for_its_block():
    source = "if a:\n    x = 1\nelse:\n    x = 2\ny = 3\n"
    assert apply(source, edit("", "if a:")) == source.replace("y = 3", "# kvtuner edit: e\nadded()\ny = 3")


@pytest.mark.parametrize(
    "statement",
    [
        "for i in n:\n    pass\nelse:\n    pass",
        "while n:\n    pass",
        "with open(n) as f, g():\n    pass",
        "try:\n    pass\nexcept E:\n    pass",
        "try:\n    pass\nfinally:\n    pass",
        "match n:\n    case 1:\n        pass",
        "def n(a, *, b=1) -> int:\n    pass",
        "class N(A, b=1):\n    pass",
        "async def n():\n    pass",
    ],
)
def test_every_compound_statement_can_be_named_by_its_header(statement):
    header = statement.partition("\n")[0]
    expected = f"a = 1\n# kvtuner edit: e\nadded()\n{statement}\n"
    assert apply(f"a = 1\n{statement}\n", edit("", header, where="before")) == expected


def test_a_whole_compound_statement_can_be_the_anchor():
    source = "if a:\n    x = 1\nif a:\n    x = 2\n"
    assert apply(source, edit("", "if a: x = 2")) == source + "# kvtuner edit: e\nadded()\n"


def test_decorators_tell_two_definitions_apart():
    source = "@a\ndef f(): return 1\n@b\ndef f(): return 2\n"
    assert apply(source, edit("", "@b\ndef f():")) == source + "# kvtuner edit: e\nadded()\n"


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    for i in n:\n        if i:\n            pass\n        elif n:\n            x = 1\n",
        "def f():\n    try:\n        pass\n    except E:\n        with n:\n            x = 1\n",
        "def f():\n    match n:\n        case 1:\n            x = 1\n",
        "def f():\n    while n:\n        pass\n    else:\n        x = 1\n",
    ],
)
def test_the_scope_is_searched_through_nested_blocks(source):
    indent = source[: source.index("x = 1")].rpartition("\n")[2]
    assert apply(source, edit("f", "x = 1")) == f"{source}{indent}# kvtuner edit: e\n{indent}added()\n"


NESTED = "def f():\n    def g():\n        x = 1\n    class C:\n        x = 2\n        def m(self):\n            x = 3\n"


@pytest.mark.parametrize("scope, value", [("f.g", 1), ("f.C", 2), ("f.C.m", 3)])
def test_a_nested_definition_is_a_scope(scope, value):
    assert f"x = {value}\n" in apply(NESTED, edit(scope, f"x = {value}"))


@pytest.mark.parametrize("scope, value", [("f", 1), ("f", 2), ("f.C", 3), ("", 1)])
def test_a_nested_definition_is_closed_to_its_outer_scope(scope, value):
    assert "the anchor is not there" in failure(NESTED, edit(scope, f"x = {value}"))


def test_definitions_of_one_name_are_searched_together():
    source = "if a:\n    def f():\n        x = 1\nelse:\n    def f():\n        x = 2\n"
    assert apply(source, edit("f", "x = 2")) == source + "        # kvtuner edit: e\n        added()\n"
    assert "the scope is there 2 times" in failure(source, edit("f", where="first"))


def test_a_missing_scope_is_named():
    message = failure("x = 1\n", edit("C.m", "x = 1"))
    assert "edit e: sglang/m.py, scope C.m: the scope is not there" in message


def test_a_missing_anchor_is_named():
    assert "edit e: sglang/m.py, the module scope: the anchor is not there" in failure("x = 1\n", edit("", "x = 2"))


def test_an_ambiguous_anchor_is_counted():
    assert "the anchor is there 2 times" in failure("x = 1\nif a:\n    x = 1\n", edit("", "x = 1"))


@pytest.mark.parametrize("anchor", ["else:", "except E:", "case 1:", "x = 1\ny = 2", "x = ("])
def test_an_anchor_that_is_no_statement_is_refused(anchor):
    assert "the anchor is not one statement" in failure("x = 1\n", edit("", anchor))


def test_an_elif_is_no_anchor():
    assert "an elif" in failure("if a:\n    pass\nelif b:\n    pass\n", edit("", "if b:"))


@pytest.mark.parametrize("source", ['é = "ü"; x = 1\n', 'x = 1; é = "ü"\n', "if é: x = 1\n", "x = 1;\n"])
def test_an_anchor_needs_its_lines_to_itself(source):
    assert "shares a line" in failure(source, edit("", "x = 1"))


def test_column_offsets_are_bytes():
    source = 'def f():\n    é = {"ü": "ä", "x": (\n        "ö")}  # ß\n    return é\n'
    expected = source.replace("# ß\n", "# ß\n    # kvtuner edit: e\n    added()\n")
    assert apply(source, edit("f", "é = {'ü': 'ä', 'x': 'ö'}")) == expected


def test_windows_line_ends_are_kept():
    source = b"def f():\r\n    x = 1\r\n    return x\r\n"
    expected = "def f():\r\n    x = 1\r\n    # kvtuner edit: e\r\n    added()\r\n    return x\r\n"
    assert apply(source, edit("f", "x = 1")) == expected


def test_tabs_and_form_feeds_are_kept():
    source = "def f():\n\tx = 1\n\f\ndef g():\n\ty = 'a\x0bb\x85c'\n"
    assert apply(source, edit("g", where="last")) == source + "\t# kvtuner edit: e\n\tadded()\n"


def test_a_file_may_end_without_a_newline():
    assert apply("x = 1", edit("", "x = 1")) == "x = 1\n# kvtuner edit: e\nadded()\n"


@pytest.mark.parametrize(
    "head",
    [
        "#!/usr/bin/env python\n",
        "# -*- coding: utf-8 -*-\n",
        "#!/usr/bin/python\n# vim: set fileencoding=utf-8 :\n",
        "# first\n# coding=utf-8\n",
    ],
)
def test_the_notice_goes_below_the_lines_that_must_stay_on_top(head):
    text = Source(f"{head}x = 'é'\n".encode(), FILE).apply([edit("", where="last")], "1")
    assert text.startswith(head.encode() + NOTICE + b"\n")


def test_the_notice_leaves_a_docstring_and_future_import_valid():
    source = b'"""Doc."""\nfrom __future__ import annotations\n'
    text = Source(source, FILE).apply([edit(where="last")], "1")
    assert text.startswith(NOTICE + b"\n" + source)


def test_a_byte_order_mark_stays_in_front():
    text = Source(b"\xef\xbb\xbfx = 1\n", FILE).apply([edit("", "x = 1", where="before")], "1")
    assert text == b"\xef\xbb\xbf" + NOTICE + b"\n# kvtuner edit: e\nadded()\nx = 1\n"


def test_another_encoding_is_refused():
    assert "not in UTF-8" in failure(b"# coding: latin-1\nx = 1\n", edit("", "x = 1"))


def test_edits_are_applied_together_to_the_pristine_source():
    one = edit("f", where="first", name="one", code="x = 1")
    two = edit("f", "return x", where="before", name="two")
    text = apply(FUNCTION, two, one)
    assert text.index("edit: one") < text.index("edit: two")
    for added in ("    # kvtuner edit: one\n    x = 1\n", "    # kvtuner edit: two\n    added()\n"):
        text = text.replace(added, "")
    assert text == FUNCTION


def test_edits_at_one_place_keep_their_order():
    text = apply("x = 1\n", edit("", "x = 1", name="b"), edit("", "x = 1", name="a"))
    assert text.index("edit: b") < text.index("edit: a")


def test_the_deeper_of_two_blocks_that_end_together_comes_first():
    source = "if a:\n    x = 1\ny = 2\n"
    below = edit("", "y = 2", where="before", name="below")
    text = apply(source, below, edit("", "if a:", name="outer"), edit("", "x = 1", name="inner"))
    places = [text.index(f"# kvtuner edit: {name}") for name in ("inner", "outer", "below")]
    assert places == sorted(places)


def test_code_is_indented_and_its_blank_lines_are_not():
    text = apply(FUNCTION, edit("f", where="last", code="\nif x:\n\n    y()\n"))
    assert text.endswith("    # kvtuner edit: e\n    if x:\n\n        y()\n")


def test_the_version_is_filled_in():
    assert apply("x = 1\n", edit("", "x = 1", code='v = "@FORK_VERSION@"')).endswith('v = "1.2.3+x.1"\n')


def test_a_result_that_does_not_compile_names_the_edit():
    message = failure("x = 1\n", edit("", "x = 1", code="return 1", name="bad"), edit("", "x = 1", name="good"))
    assert "edit bad" in message and "does not parse" in message


def test_a_future_import_pushed_down_is_refused():
    source = "from __future__ import annotations\n"
    assert "does not parse" in failure(source, edit("", source, where="before"))


def test_code_that_indentation_would_change_is_refused():
    assert "reads differently" in failure(FUNCTION, edit("f", where="last", code="x = '''a\nb'''"))


def test_a_broken_upstream_file_is_named():
    assert "sglang/m.py does not parse" in failure("x = (\n", edit("", "x = 1"))


def test_other_bytes_stay_as_they_are():
    source = FUNCTION.replace("return x", "return  x   ") + "\n\n\nz   =   [ 1,2 ]\n"
    text = apply(source, edit("f", "return x"))
    assert text.replace("    # kvtuner edit: e\n    added()\n", "") == source
