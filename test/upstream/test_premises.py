"""What own code uses of upstream: how it is found, recorded and compared."""

import pytest
from synthetic import UPSTREAM

from backend import premises, uses
from backend.errors import ForkError
from backend.review import CONFLICT, REVIEW
from backend.surface import Surface

BASE = """
class Base:
    size: int = 4

    def __init__(self, length):
        self.length = length
        self.buffer = [0] * length

    def run(self, batch):
        return batch

    @property
    def name(self):
        return "base"


def make(kind, *, fast=False):
    return Base(kind)
"""
FIELDS = (
    "class Serving:\n    _NS_PATH = 'serving'\n    enable_a: A[bool, 'helps'] = False\n    port: A[int, 'a port'] = 1\n"
)
FILES = {
    "sglang/base.py": BASE,
    "sglang/again.py": "from sglang.base import Base as Renamed, make\n",
    "sglang/srt/environ.py": "SGLANG_SPEED = 1\n",
    "sglang/srt/arg_groups/fields/serving.py": FIELDS,
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


@pytest.fixture
def used(fork, tree):
    """Call with own code, and declarations, to get what it uses."""
    (fork.root / "python/upstream/edits/greet.py.toml").unlink()

    def find(code, declared=""):
        fork.write("python/sglang/srt/ours.py", code)
        fork.write("python/upstream/objects.toml", declared)
        return uses.find(Surface(tree), fork.root)

    return find


def names(found):
    return set(found) - {name for name in found if name.startswith("sglang.") and "." not in name.partition(":")[2]}


def record(found, tree):
    accepted = premises.accept(premises.judge(found, premises.Record(), Surface(tree)), premises.Record(), [])
    return accepted


def findings(found, recorded, tree, name, before, after):
    path = tree / name
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    judged = premises.judge(found, recorded, Surface(tree))
    return {item.name: (item.status, item.problem) for item in judged if item.status != "ok"}


@pytest.mark.parametrize(
    "code, expected",
    [
        ("from sglang.base import Base\ndef f(x: Base):\n    return x.buffer\n", {"sglang.base:Base.buffer"}),
        (
            "from sglang.again import Renamed\ndef f(x: Renamed):\n    y = x\n    return y.size\n",
            {"sglang.again:Renamed.size"},
        ),
        (
            "from sglang.base import Base\nprint(Base(3).run(1))\n",
            {"sglang.base:Base.__init__", "sglang.base:Base.run"},
        ),
        (
            "from sglang.base import Base\nclass Ours(Base):\n    def run(self, batch):\n        return self.length + self.own()\n"
            "    def own(self):\n        return 1\n",
            {"base:sglang.base:Base", "sglang.base:Base.run", "sglang.base:Base.length"},
        ),
        (
            "import os\nprint(os.environ['SGLANG_SPEED'], '--port', '--own')\n",
            {"variable:SGLANG_SPEED", "argument:port"},
        ),
        (
            "from sglang.base import Base\ndef f(x: Base):\n    return getattr(x, 'length', None)\n",
            {"sglang.base:Base.length"},
        ),
    ],
)
def test_what_own_code_uses_is_found(used, code, expected):
    assert names(used(code)) == expected


def test_imports_are_found_with_their_users_and_what_they_pass(used):
    found = used("from sglang.again import make\n\n\ndef f():\n    return make(1, fast=True)\n")
    assert found["sglang.again:make"].passes == {"fast"}
    assert found["sglang.again:make"].why == "used by srt/ours.py"


def test_declared_objects_members_and_lists_are_found(used):
    declared = """
[[object]]
name = "thing"
type = "sglang.base:Base"
why = "a parameter without an annotation"
[[fields]]
file = "srt/ours.py"
name = "REFUSED"
why = "refused"
[[members]]
owner = "sglang.base:Base"
names = ["buffer"]
why = "read by a kernel"
[[behaviour]]
name = "sglang.base:make"
why = "it allocates"
"""
    found = used("REFUSED = ('enable_a',)\n\n\ndef f(thing):\n    return thing.length\n", declared)
    assert set(found) == {
        "sglang.base:Base.length",
        "argument:enable_a",
        "sglang.base:Base.buffer",
        "behaviour:sglang.base:make",
    }
    assert found["argument:enable_a"].why == "refused; used by srt/ours.py"


def test_a_wrong_declaration_is_refused(used):
    with pytest.raises(ForkError, match=r"a table \[\[object\]\] has name; valid are name, type, why"):
        used("", '[[object]]\nname = "thing"\n')


def test_a_declared_table_that_own_code_has_not_is_refused(used):
    with pytest.raises(ForkError, match=r"srt/ours.py has no REFUSED that lists arguments"):
        used("", '[[fields]]\nfile = "srt/ours.py"\nname = "REFUSED"\nwhy = "refused"\n')
    with pytest.raises(ForkError, match="the object sglang.srt.theirs:thing is of no own module"):
        used("", '[[object]]\nname = "sglang.srt.theirs:thing"\ntype = "sglang.base:Base"\nwhy = "no reason"\n')


def test_the_forks_own_arguments_are_no_premises(used):
    declared = '[[fields]]\nfile = "srt/ours.py"\nname = "PICKED"\nwhy = "compared"\n'
    assert set(used("PICKED = ('kvtuner_size', 'port')\n", declared)) == {"argument:port"}


def test_names_that_an_edit_uses_are_premises(fork, tree):
    (tree / "sglang/greet.py").write_text(UPSTREAM["sglang/greet.py"])
    fork.write("python/upstream/objects.toml", "")
    path = fork.root / "python/upstream/edits/greet.py.toml"
    path.write_text(path.read_text().replace("text = text.upper()", "text = text + _suffix + name"))
    found = uses.find(Surface(tree), fork.root)
    assert set(found) == {"name:sglang.greet:greet:_suffix", "name:sglang.greet:greet:name"}
    judged = premises.judge(found, premises.Record(), Surface(tree))
    assert [(item.name, item.status) for item in judged if item.status == CONFLICT] == [
        ("name:sglang.greet:greet:_suffix", CONFLICT)
    ]


USING = """
from sglang.base import Base, make


class Ours(Base):
    def run(self, batch):
        return self.buffer


def f():
    return make(1, fast=True)
"""


@pytest.mark.parametrize(
    "name, before, after, expected",
    [
        ("sglang/base.py", "def make", "def build", {"sglang.base:make": (CONFLICT, "missing")}),
        ("sglang/base.py", "fast=False", "quick=False", {"sglang.base:make": (CONFLICT, "takes no fast")}),
        ("sglang/base.py", "fast=False", "fast=True", {"sglang.base:make": (REVIEW, "changed")}),
        ("sglang/base.py", "self.buffer", "self.storage", {"sglang.base:Base.buffer": (CONFLICT, "missing")}),
        ("sglang/base.py", "[0] * length", "[1] * length", {"sglang.base:Base.buffer": (REVIEW, "changed")}),
        (
            "sglang/base.py",
            "    @property",
            "    def extra(self):\n        pass\n\n    @property",
            {"base:sglang.base:Base": (REVIEW, "changed")},
        ),
        ("sglang/base.py", "return batch", "return batch + 1", {}),
        (
            "sglang/srt/arg_groups/fields/serving.py",
            "    port",
            "    enable_b: A[bool, 'helps'] = False\n    port",
            {"argument:enable_b": (REVIEW, "a new argument: must the quantized cache refuse it?")},
        ),
        (
            "sglang/srt/arg_groups/fields/serving.py",
            "= 1",
            "= 2",
            {"argument:port": (REVIEW, "another type or default")},
        ),
        ("sglang/srt/arg_groups/fields/serving.py", "'a port'", "'some port'", {}),
        (
            "sglang/srt/arg_groups/fields/serving.py",
            "    port: A[int, 'a port'] = 1\n",
            "",
            {"argument:port": (REVIEW, "gone; nothing of ours names it")},
        ),
    ],
)
def test_what_upstream_changes_is_named(used, tree, name, before, after, expected):
    found = used(USING)
    assert findings(found, record(found, tree), tree, name, before, after) == expected


def test_the_record_is_read_as_it_was_written(fork, used, tree):
    found = used(USING)
    recorded = record(found, tree)
    recorded.release = "1.2.3"
    assert recorded.save(found, fork.root) and not recorded.save(found, fork.root)
    assert premises.Record.load(fork.root) == recorded
    (fork.root / premises.PREMISES).write_text("release = '1'\n")
    with pytest.raises(ForkError, match="damaged"):
        premises.Record.load(fork.root)


def test_record_accepts_own_changes_but_of_upstreams_only_what_is_named(used, tree):
    found = used(USING)
    recorded = record(found, tree)
    path = tree / "sglang/base.py"
    path.write_text(path.read_text().replace("fast=False", "fast=True").replace("[0]", "[1]"))
    found = used(USING + "\n\ndef g(x: Base):\n    return x.size\n")
    judged = premises.judge(found, recorded, Surface(tree))
    accepted = premises.accept(judged, recorded, ["sglang.base:ma*"])
    left = [item.name for item in premises.judge(found, accepted, Surface(tree)) if item.status == REVIEW]
    assert left == ["sglang.base:Base.buffer"] and "sglang.base:Base.size" in accepted.used
