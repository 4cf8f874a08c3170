"""Fingerprints: what changes them and what does not."""

import ast

import pytest

from backend.syntax import canonical, find_scopes, fingerprint


def mark(source, scope, anchored=None):
    tree = ast.parse(source)
    node = ast.parse(anchored).body[0] if anchored else None
    return fingerprint(find_scopes(tree, scope)[0], node)


FUNCTION = "def f(a):\n    x = 1\n    def g():\n        return 2\n    return x\n"
CLASS = "class C(B):\n    size = 1\n    def m(self):\n        return 2\n"


@pytest.mark.parametrize("old, new", [("x = 1", "x  =  (1)  # why"), ("def f", "\n\ndef f")])
def test_layout_does_not_change_a_fingerprint(old, new):
    assert mark(FUNCTION.replace(old, new), "f") == mark(FUNCTION, "f")


@pytest.mark.parametrize("old, new", [("x = 1", "x = 2"), ("(a)", "(a, b)"), ("return 2", "return 3")])
def test_a_function_counts_as_a_whole(old, new):
    assert mark(FUNCTION.replace(old, new), "f") != mark(FUNCTION, "f")


def test_a_class_counts_without_the_bodies_of_its_methods():
    assert mark(CLASS.replace("return 2", "return 3"), "C") == mark(CLASS, "C")
    for old, new in [("size = 1", "size = 2"), ("(self)", "(self, a)"), ("(B)", "(D)")]:
        assert mark(CLASS.replace(old, new), "C") != mark(CLASS, "C")


def test_at_module_level_the_anchored_statement_counts():
    assert mark("x = 1\ny = 2\n", "", "x = 1") == mark("x = 1\n", "", "x = 1")
    assert mark("x = 1\n", "", "if x: y") != mark("x = 1\n", "", "if x: z")


def test_at_a_modules_edge_its_own_statements_count():
    assert mark("y = 1\n" + FUNCTION, "") == mark("y = 1\n" + FUNCTION.replace("x = 1", "x = 2"), "")
    assert mark("y = 1\n" + FUNCTION, "") != mark("y = 2\n" + FUNCTION, "")


def test_a_fingerprint_is_the_same_on_every_python():
    # The digest was made on 3.11; definitions and f-strings are what later releases describe differently.
    source = "def f(a: int = 1, *b, **c) -> str:\n    return f'{a:>{b}}{c!r}' 'é' f''\n"
    assert mark(source, "f") == "28917f25b4a3f8bc"


def test_different_trees_differ():
    texts = [
        "a",
        "b",
        "a.b",
        "a(b)",
        "a[b]",
        "None",
        "'None'",
        "1",
        "1.0",
        "True",
        "b'1'",
        "{**a}",
        "[a]",
        "(a,)",
        "f'{a}'",
    ]
    assert len({canonical(ast.parse(text)) for text in texts}) == len(texts)
