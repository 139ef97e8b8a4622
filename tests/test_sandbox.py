"""sandbox.py: right and wrong programs, what passes between the processes, and hostile programs, however confined."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile import ESCAPES, HARMFUL, HOSTILE

from minir1 import sandbox
from minir1.sandbox import MEANS, run_tests

ROOT = Path(__file__).parent.parent
MARK = 2**28 + os.getpid()  # bytes of memory, by which the processes of these tests are recognised
SECRET = "assert f(3) == 41 and f(4) == 50\nassert f('x') == (1, {'a': None})"  # no program here returns this


@pytest.fixture(scope="module", params=MEANS)
def means(request):
    """Each of the protections that this machine has."""
    result = run_tests("def f(x): return x", "assert f(1) == 1", names=["f"], seconds=30, means=request.param)
    if result.status == "unjudged":
        pytest.skip(f"no {request.param} on this machine: {result.reason}")
    assert result.status == "passed"
    return request.param


def status(program, tests, **rest):
    return run_tests(program, tests, **{"names": ["f"], "seconds": 20, **rest}).status


# ---- right and wrong programs


def test_right_and_wrong(means):
    tests = "assert f(2) == 4\nassert f(x=3) == 9"
    assert run_tests("def f(x): return x * x", tests, names=["f"], means=means).status == "passed"
    result = run_tests("def f(x): return x + x", tests, names=["f"], means=means)
    assert result.status == "failed" and "AssertionError in 'assert f(x=3) == 9'" in result.reason


WRONG = {
    "nothing": "",
    "a name missing": "def g(x): return x",
    "no Python": "def f(x): return (",
    "a null byte": "def f(x): return 1 # \0",
    "a surrogate": "def f(x): return '\ud800'",
    "no function": "f = 4",
    "an exception": "def f(x): raise KeyError(x)",
    "an exception at the top": "def f(x): return 4\n1 / 0",
    "waits for input": "def f(x): return int(input())",
    "a long program": "def f(x): return 5\n" + "y = 1\n" * 20000,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs(name):
    assert status(WRONG[name], "assert f(2) == 4") == "failed"


def test_the_main_block_of_a_program_does_not_run():
    assert status("def f(x): return x\nif __name__ == '__main__': f = input()", "assert f(2) == 2") == "passed"


def test_tests_that_call_nothing_do_not_pass():
    assert status("def f(x): return x", "assert True") == "failed"
    assert status("def f(x): return x", "") == "failed"


def test_helpers_are_the_tests_own():
    """A helper of the same name in the program changes nothing: the tests have theirs from `helpers`."""
    program = "def double(x): return 0\ndef f(x): return double(x)"
    assert status(program, "assert double(2) == f(2)", helpers="def double(x): return 2 * x") == "failed"
    assert status(program, "assert double(2) == 4 and f(2) == 0", helpers="def double(x): return 2 * x") == "passed"


def test_tests_that_cannot_run_judge_nothing():
    for rest in ({"helpers": "1 / 0"}, {"tests": "assert ("}, {"tests": "f(print)"}, {"tests": "f(iter([]))"}):
        arguments = {"tests": "assert f(1) == 1", **rest}
        assert status("def f(x): return x", **arguments) == "unjudged", rest


def test_a_program_cannot_make_itself_unjudged():
    program = "def f(x):\n    y = []\n    for _ in range(500): y = [y]\n    return y"
    assert status(program, "f(f(1))\nassert f(1) == 3") == "failed"


VALUES = ["None", "True", "False", "0", "-7", "2**63", "-(2**63)", "10**400", "1.5", "-0.0", "float('inf')", "1e308",
          "''", "'a\\n\\x00é\\u2028\\ud800😀'", "b'\\x00\\xff'", "bytearray(b'ab')", "1+2j", "[]", "()", "(1,)",
          "[1, [2, (3,)]]",
          "{}", "{1: 'a', 'b': [2], (1, 2): None, None: 3, 1.5: 1}", "set()", "{1, 2}", "frozenset({1, (2,)})",
          "range(2, 9, 3)", "__import__('fractions').Fraction(1, 3)", "__import__('decimal').Decimal('1.10')",
          "{'list': ['tuple', 1]}", "['object', 0]", "['dict', [[1, 2]]]"]  # fmt: skip


def test_plain_data_arrives_as_it_was():
    """Value and type, at both ends: the program checks what it gets, and returns it."""
    program = f"VALUES = [{', '.join(VALUES)}]\ndef f(i, x):\n    assert repr(VALUES[i]) == repr(x)\n    return x"
    tests = f"for i, x in enumerate([{', '.join(VALUES)}]):\n    y = f(i, x)\n    assert repr(x) == repr(y), (x, y)\n"
    assert run_tests(program, tests, names=["f"], seconds=20).reason == ""
    assert run_tests("def f(): return float('nan')", "x = f()\nassert x != x", names=["f"]).status == "passed"


def test_subclasses_arrive_as_their_plain_base():
    program = (
        "import enum, collections\nclass E(enum.IntEnum):\n    A = 3\nclass S(str): pass\n"
        "P = collections.namedtuple('P', 'x y')\nclass B(float): pass\n"
        "def f(): return [E.A, S('s'), P(1, 2), B(-0.0), collections.Counter('aa'), collections.OrderedDict(a=1)]"
    )
    tests = "assert repr(f()) == repr([3, 's', (1, 2), -0.0, {'a': 2}, {'a': 1}])"
    assert run_tests(program, tests, names=["f"]).reason == ""


def test_objects_of_the_program_can_be_used_and_passed_back():
    program = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def double(self): return 2 * self.value
def total(node): return node.value + total(node.left) if node else 0
def count(n):
    for i in range(n): yield i
class Bag:
    def __len__(self): return 3
    def __bool__(self): return False
    def __getitem__(self, key): return key
def error(): raise ValueError('v')
class Own(Exception): pass
def own(): raise Own('o')
limit = 7
"""
    tests = """
root = Node(1)
root.left = Node(5)
assert total(root) == 6 and root.left.value == 5 and root.double() == 2
assert list(count(3)) == [0, 1, 2] and sum(count(4)) == 6 and next(count(1)) == 0
assert len(Bag()) == 3 and not Bag() and Bag()["a"] == "a" and Node
assert Node(1) != Node(1) and not Node(1) == 1 and Node(1) != None
assert limit == 7
for function, kind in (error, ValueError), (own, RuntimeError):
    try:
        function()
    except kind as e:
        pass
    else:
        assert False
try:
    total(3)
except AttributeError:
    pass
"""
    names = ["Node", "total", "count", "Bag", "error", "own", "limit"]
    assert run_tests(program, tests, names=names).reason == ""


def test_arguments_are_copies():
    assert status("def f(x): x.append(1)", "x = []\nf(x)\nassert x == []") == "passed"


def test_the_verdict_is_the_same_every_time():
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f'})"
    tests = "import random\nraise ValueError(str([f(), random.random()]))"
    first = run_tests(program, tests, names=["f"]).reason
    assert "ValueError" in first
    assert run_tests(program, tests, names=["f"]).reason == first


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"seconds": float("nan")}, {"memory": 1}, {"means": "trust"}])
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        run_tests("", "", names=[], **wrong)


# ---- hostile programs

RETURN = "def f(x): return 0\n"


@pytest.fixture(scope="module")
def outcome(means, tmp_path_factory):
    """name -> (result, seconds) of all hostile programs; a file and a directory stand where they could hurt them."""
    victim = tmp_path_factory.mktemp("host") / "victim"
    victim.write_text("41 50")
    for path in (victim, *list(victim.parents)[:2]):
        path.chmod(0o777)
    before = {path.name for path in Path("/tmp").iterdir()}
    programs = dict(HOSTILE)
    layers = run_tests(RETURN, "f(1)", names=["f"], means=means).layers
    if "seccomp" in layers:
        programs |= {name: text.replace("{me}", str(os.getpid())) for name, text in HARMFUL.items()}

    def run(item):
        began = time.perf_counter()
        result = run_tests(item[1], SECRET, names=["f"], seconds=0.6, memory=MARK, means=means)
        return item[0], (result, time.perf_counter() - began)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = dict(pool.map(run, programs.items()))
    left = {path.name for path in Path("/tmp").iterdir()} - before
    return results, victim, layers, left


@pytest.mark.parametrize("name", [*HOSTILE, *HARMFUL])
def test_hostile_programs_fail_in_time(outcome, name):
    results, *_ = outcome
    if name not in results:
        pytest.skip("no seccomp on this machine")
    result, seconds = results[name]
    assert result.status == "failed", result
    assert seconds < 15


def test_nothing_is_left_of_them(outcome):
    _, victim, _, left = outcome
    assert victim.read_text() == "41 50" and os.listdir(victim.parent) == ["victim"]
    assert not any(name.isdigit() or name == "link" for name in left)
    wait(lambda: processes(MARK) == [])


def processes(memory: int) -> list[str]:
    """Command lines of all processes of sandboxes with this limit of memory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            pass  # it has ended
    return [text for text in found if "minir1.sandboxed" in text and str(memory) in text]


def wait(condition, seconds=20):
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late
        time.sleep(0.02)


def test_no_way_out(outcome, means):
    _, victim, layers, _ = outcome
    if not {"landlock", "seccomp"} <= {*layers} and "namespaces" not in layers:
        pytest.skip(f"nothing but {', '.join(layers)} on this machine")
    values = {"victim": str(victim), "root": str(ROOT), "me": os.getpid()}
    actions = {name: text.format(**values) for name, text in ESCAPES.items()}
    program = f"""
import ctypes, fcntl, glob, os, resource, socket, subprocess, time
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0: raise OSError(ctypes.get_errno(), "")
    return result
ACTIONS = {actions!r}
def f(name):
    try: return f"{{name}}: {{eval(ACTIONS[name])!r}}"[:200]
    except (OSError, IndexError, ValueError): return ""
"""
    tests = f"done = [f(name) for name in {list(ESCAPES)!r}]\nassert not any(done), [x for x in done if x]"
    assert run_tests(program, tests, names=["f"], seconds=20, means=means).reason == ""
    assert victim.read_text() == "41 50" and os.listdir(victim.parent) == ["victim"]


def test_a_folder_of_its_own(means):
    program = "import os\ndef f():\n    open('a', 'w').write('x')\n    return os.getcwd(), os.listdir('.')"
    wanted = "assert f() == ('/tmp', ['a'])"
    result = run_tests(program, wanted, names=["f"], means=means)
    assert result.status == ("failed" if means == "plain" else "passed"), result
    if "seccomp" in result.layers and means == "plain":
        assert "OSError" in result.reason  # no file at all


def test_the_environment_is_cleared(means, monkeypatch):
    monkeypatch.setenv("API_KEY", "1234")
    program = "import os\ndef f(): return sorted(os.environ)"
    tests = "assert not {*f()} - {'PYTHONHASHSEED', 'PYTHONUTF8', 'LC_CTYPE', 'PWD'}, f()"
    assert run_tests(program, tests, names=["f"], means=means).reason == ""


# ---- the machinery


def test_many_threads_at_once():
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda n: status(f"def f(x): return x + {n}", f"assert f(1) == {1 + n % 20}"), range(40))
    assert list(results) == ["passed"] * 20 + ["failed"] * 20


def test_a_killed_parent_leaves_nothing(means):
    """Its programs end with it, although they would run for a minute."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc to look for processes in")
    code = (
        "from minir1 import sandbox\nimport time\n"
        "program = 'import time\\nwhile True: time.sleep(1)'\n"
        f"sandbox.run_tests(program, 'f()', names=['f'], seconds=60, memory={MARK + 1}, means={means!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait(lambda: len(processes(MARK + 1)) > 2)
    time.sleep(0.1)
    parent.kill()
    parent.communicate()
    wait(lambda: processes(MARK + 1) == [])


def test_a_killed_warden_leaves_nothing(means):
    """As Ctrl-C kills it."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc to look for processes in")

    def kill():
        wait(lambda: len(processes(MARK + 2)) > 2)
        time.sleep(0.1)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                text = path.read_bytes().decode(errors="replace")
                parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
                if str(MARK + 2) in text and parent == os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)

    program = "import time\nwhile True: time.sleep(1)"
    thread = threading.Thread(target=kill)
    thread.start()
    result = run_tests(program, "f()", names=["f"], seconds=60, memory=MARK + 2, means=means)
    thread.join()
    assert result.status == "unjudged"
    wait(lambda: processes(MARK + 2) == [])


def test_a_machine_without_means(monkeypatch):
    monkeypatch.setattr(sandbox, "best", lambda: ("", (), "no kernel"))
    assert status("def f(x): return x", "assert f(1) == 1") == "unjudged"
    assert sandbox.protection() == "Programs cannot be run on this machine: no kernel."


def test_bubblewrap_that_does_not_work(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no permission >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    result = run_tests("def f(x): return x", "assert f(1) == 1", names=["f"], means="bwrap")
    assert result.status == "unjudged" and "no permission" in result.reason
    assert sandbox.best.__wrapped__()[0] in ("namespaces", "plain")


@pytest.mark.parametrize("layers", [("limits",), ("limits", "seccomp"), ("limits", "landlock", "seccomp")])
def test_what_does_not_protect_is_said(monkeypatch, layers):
    monkeypatch.setattr(sandbox, "best", lambda: ("plain", layers, ""))
    sentence = sandbox.protection()
    assert ("files that this user may read" in sentence) == ("landlock" not in layers)
    assert ("the network" in sentence) == ("seccomp" not in layers)


def test_protection_is_one_sentence():
    sentence = sandbox.protection()
    assert sentence.startswith("Programs run") and sentence.endswith(".") and sentence.count(". ") == 0


COMMON = [  # what right programs use
    "from dataclasses import dataclass, field\n@dataclass(order=True)\nclass P:\n a: int\n b: int = field(default=0)"
    "\ndef f(x): return P(x * x).a",
    "import itertools, functools, operator\ndef f(x): return functools.reduce(operator.add, itertools.repeat(x, x))",
    "import re, string, textwrap\ndef f(x): return int(re.sub(r'\\D', '', f'a{x * x}b'))",
    "import heapq, bisect, math\ndef f(x):\n h = [math.isqrt(x**4), 99]\n heapq.heapify(h)\n return heapq.heappop(h)",
    "from typing import Generic, TypeVar\nT = TypeVar('T')\nclass B(Generic[T]):\n def g(self, x: T) -> T: return x\n"
    "def f(x: int) -> int: return B().g(x * x)",
    "from collections import Counter, defaultdict, deque, namedtuple\nN = namedtuple('N', 'a')\n"
    "def f(x): return N(Counter('a' * x * x)['a']).a",
    "from decimal import Decimal\ndef f(x): return Decimal(x) ** 2",
    "from fractions import Fraction\ndef f(x): return Fraction(x * x, 1)",
    "import random, statistics, json, copy\n"
    "def f(x): return copy.copy(json.loads(json.dumps(statistics.mean([x * x]))))",
    "from datetime import datetime, timedelta\n"
    "def f(x): return (datetime(2020, 1, 1) + timedelta(days=x * x) - datetime(2020, 1, 1)).days",
    "from functools import lru_cache\n@lru_cache(None)\ndef g(n): return n and g(n - 1) + 1\ndef f(x): return g(x * x)",
    "from concurrent.futures import ThreadPoolExecutor\n"
    "def f(x):\n with ThreadPoolExecutor(2) as pool: return list(pool.map(lambda y: y * y, [x]))[0]",
    "def f(x):\n n = 0\n def more():\n  nonlocal n\n  n += 1\n  return n\n return [more() for _ in range(x * x)][-1]",
]  # fmt: skip


def test_what_right_programs_use(means):
    for program in COMMON:
        assert status(program, "assert f(2) == 4 and f(3) == 9", means=means) == "passed", program
