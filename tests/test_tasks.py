"""tasks/__init__.py: tasks by name, variant and path, their data, mixtures, and one-line errors."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from minir1 import rewards
from minir1.tasks import Problem, Task, Verdict, countdown, load, problems_of, share, spread

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "docs" / "example_task.py"
OWN = """
from __future__ import annotations
from dataclasses import dataclass
from minir1.tasks import Problem, Verdict

@dataclass
class Line:
    text: str

def problems(split, data{variant}):
    return [Problem(f"{{split}} {{data}}{shown}", "a b")]

def verify(problem, text):
    return Verdict("right" if problem.reference in text else "wrong", {{}})
"""


def said(answer):
    return f"<think>hm</think><answer>{answer}</answer>"


def own(folder, name="own.py", more="", variants=False):
    """A user's file with the two functions and `more`."""
    path = folder / name
    text = OWN.format(variant=", variant" if variants else "", shown=" {variant}" if variants else "")
    path.write_text(text + more)
    return path


# ---------------------------------------------------------------- one task


def test_countdown_by_name():
    task = load("countdown")
    assert isinstance(task, Task) and task.name == "countdown"
    assert task.splits == ("train", "validation", "test", "unseen")
    problem = task.problems("test")[0]
    assert problem == countdown.problems("test")[0] and problem.task == ""
    assert task.verify(problem, said(problem.reference)).status == "right"
    assert task.final(problem, said(" ( 1 +2)")) == "(1+2)" and task.final(problem, "3") is None
    assert task.difficulty(problem) in ("easy", "middle", "hard")
    assert task.baselines(problem, "").keys() == {"search", "search_without_repeats"}
    assert set(task.rates) | set(task.rates.values()) <= task.behaviour(problem, "").keys()
    with pytest.raises(FrozenInstanceError):
        task.name = "other"


def test_variants():
    wide = load("countdown:wide")
    assert wide.name == "countdown:wide" and {p.level for p in wide.problems("train")} == {"wide"}
    assert wide.problems("train") == countdown.problems("train", None, "wide")
    assert wide.vocabulary()[1] == 100 and "wide" in {countdown.VARIANTS[1]}
    assert next(wide.documents(7)) == next(countdown.documents(7, "wide"))
    assert load("countdown:default").problems("test") == load("countdown").problems("test")


def test_the_example_of_the_documents():
    assert len(EXAMPLE.read_text().splitlines()) < 45
    task = load(EXAMPLE)
    assert task.name == "example_task" and task.splits == ("train", "validation", "test")
    parts = [task.problems(split) for split in task.splits]
    assert sum(map(len, parts)) == 8100 and 0.15 < len(parts[-1]) / 8100 < 0.25
    assert len({p.prompt for part in parts for p in part}) == 8100  # no problem is in two splits
    problem = Problem("What is 17 + 26?", "43")
    assert any(problem in part for part in parts)
    for answer, status in (("43", "right"), ("043", "right"), ("44", "wrong"), ("43.0", "wrong"), ("٤٣", "wrong")):
        assert task.verify(problem, said(answer)) == Verdict(status, {"accuracy": float(status == "right")})
    assert task.behaviour(problem, "17 + 26 = 43</think>=") == {"equations": 1}
    assert task.difficulty is task.baselines is task.documents is task.vocabulary is task.probes is None


def test_a_file_of_the_user(tmp_path):
    task = load(own(tmp_path))
    assert (task.name, task.splits, task.rates, task.behaviour) == ("own", ("train", "test"), {}, None)
    assert task.problems("test")[0].prompt == "test None"  # without DATA it may be given or not
    assert load(own(tmp_path), "x.csv").problems("train")[0].prompt == "train x.csv"
    assert task.verify(task.problems("test")[0], "a b").status == "right"
    assert task.final(task.problems("test")[0], said(" a  b")) == "ab"
    path = own(tmp_path, "b+c.py", "SPLITS = ['dev']\nVARIANTS = ('short', 'long')\n"
               "def final(problem, text): return text[:1]\ndef documents(seed, variant): yield f'{seed} {variant}'\n",
               variants=True)
    task = load(path)  # the + is part of the path
    assert task.splits == ("dev",) and task.problems("dev")[0].prompt == "dev None short"
    assert task.final(None, "xyz") == "x" and list(task.documents(3)) == ["3 short"]
    path = path.rename(tmp_path / "bc.py")
    assert load(f"{path}:long").problems("dev")[0].prompt == "dev None long" and load(f"{path}:long").name == "bc:long"


def test_files_do_not_share_their_state(tmp_path):
    first, second = load(own(tmp_path)), load(own(tmp_path, more="SPLITS = ('dev',)\n"))
    assert first.splits == ("train", "test") and second.splits == ("dev",)


REFUSED = [
    ("nim", None, "unknown task 'nim'; allowed: .*countdown, .*gsm8k, .*a path that ends in .py, or several .*"),
    ("", None, "unknown task ''"),
    ("countdown+", None, "unknown task ''"),
    ("countdown_search", None, "unknown task 'countdown_search'"),  # a part of a task, and no task
    ("../rewards", None, "unknown task"),
    ("nowhere/mine.py", None, "task 'nowhere/mine.py': there is no such file"),
    ("countdown:huge", None, "task countdown has no variant 'huge'; it has default, wide, four"),
    ("countdown:", None, "task countdown has no variant ''"),
    ("gsm8k:hard", "x", "task gsm8k has no variant 'hard'; it has plain, boxed"),
    ("gsm8k", None, "task gsm8k needs data: the folder with train.jsonl and test.jsonl"),
    ("countdown", "x.jsonl", "task countdown takes no data, but got 'x.jsonl'"),
    ("countdown", {"gsm8k": "x"}, "data for gsm8k; the tasks are countdown"),
    ("countdown+gsm8k", None, "task gsm8k needs data"),
    ("countdown+gsm8k", "x", "data of several tasks: name=path,name=path, not 'x'"),
    ("countdown+gsm8k", "gsm8k=x,math=y", "data for math; the tasks are countdown, gsm8k"),
    ("countdown+gsm8k", "gsm8k=x,countdown=y", "task countdown takes no data, but got 'y'"),
    ("countdown+countdown", None, "names one task twice"),
]


@pytest.mark.parametrize("spec, data, match", REFUSED)
def test_refused_with_the_reason(spec, data, match):
    with pytest.raises(ValueError, match=match) as error:
        load(spec, data)
    assert "\n" not in str(error.value)


WRONG = [
    ("def verify(problem, text): return True", "task own: verify returns 'True', which is no Verdict"),
    ("def verify(problem, text): pass", "task own: verify returns 'None', which is no Verdict"),
    ("def verify(problem, text): return Verdict('yes', {})", "verify returns .*status='yes'.*, which is no Verdict"),
    ("def verify(problem, text): return Verdict('wrong', {}, None)", "returns reason = None, which is no text"),
    ("def verify(problem, text): return Verdict('right', None)", "returns scores = None, which is no mapping of names"),
    ("def verify(problem, text): return Verdict('right', {'a': 'good'})", "'good'}, which is no mapping of names to"),
    ("def verify(problem, text): return Verdict('right', {'a': float('nan')})", "nan}, which is no mapping of names"),
    ("def problems(split, data): return [Problem('1+1', 2)]", "with reference = 2, which is no text"),
    ("def problems(split, data): return [Problem('1+1', None)]", "with reference = None, which is no text"),
    ("def problems(split, data): return [Problem('1+\\ud83d', '2')]", r"with prompt = '1\+\\ud83d', which is no text"),
    ("def problems(split, data): pass", "task own: problems returns 'None', which is no Problem"),
    ("def problems(split, data): return ['1+1']", r"task own: problems returns '1\+1', which is no Problem"),
    ("def problems(split, data): return Problem('1+1', '2')", None),  # a problem that is no list of one: as one
    ("def problems(split, data): return (Problem(str(n), '') for n in range(3))", None),
    ("SPLITS = 'train'", r"task own: SPLITS = 'train': must be a tuple of names, such as \('train',\)"),
    ("SPLITS = None", "task own: SPLITS = None: must be a tuple of names"),
    ("VARIANTS = 'wide'", "task own: VARIANTS = 'wide': must be a tuple of names"),
]


@pytest.mark.parametrize("line, match", WRONG)
def test_what_a_file_gets_wrong_is_named(tmp_path, line, match):
    def use():
        task = load(own(tmp_path, more=line + "\n"))
        return task.verify(task.problems("test")[0], "a b")

    if match is None:
        assert use().status in ("right", "wrong")
        return
    with pytest.raises(ValueError, match=match) as error:
        use()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=match):  # in a mixture too
        task = load(f"countdown+{tmp_path / 'own.py'}")
        task.verify(task.problems("test")[-1], "a b")


OPTIONAL = {  # returned by a function of (problem, text), or raised there: what is said
    "behaviour": {"{'x': 1 / 0}": r"raises ZeroDivisionError\('division by zero'\)", "{'x': float('nan')}": "finite",
                  "3": "returns '3', which is no mapping", "{'x': 'many'}": "which is no mapping of names to finite"},
    "baselines": {"{}['x']": r"raises KeyError\('x'\)", "None": "returns 'None', which is no mapping of names"},
    "attempts": {"None": "returns 'None', which is no list", "[][0]": "raises IndexError"},
    "rewrite": {"3": "returns '3', which is neither text nor None", "text + 1": "raises TypeError"},
    "final": {"3": "returns '3', which is neither text nor None", "text[99]": "raises IndexError"},
    "difficulty": {"3": "returns '3', which is no text"},
    "same": {"1 / 0": "raises ZeroDivisionError"},
}  # fmt: skip


@pytest.mark.parametrize("key", OPTIONAL)
def test_an_error_of_an_optional_function_names_it(tmp_path, key):
    arguments = {"difficulty": ("a",), "same": ("a", "b", "c")}.get(key, ("a", "b"))
    for value, said in OPTIONAL[key].items():
        named = ", ".join(("problem", "text", "other")[: len(arguments)])
        path = own(tmp_path, more=f"def {key}({named}):\n    return {value}\n")
        for task in (load(path), load(f"countdown+{path}")):
            problem = task.problems("test")[-1]
            with pytest.raises((RuntimeError, ValueError), match=f"^task own: {key} .*{said}") as error:
                getattr(task, key)(problem, *arguments[1:])
            assert (error.type is RuntimeError) == (error.value.__cause__ is not None) == ("raises" in said)


def test_optional_functions_may_return_numbers_of_numpy(tmp_path):
    numbers = "{'x': np.float32(2), 'y': np.int64(3), 'z': True}"
    more = f"import numpy as np\ndef behaviour(problem, text):\n    return {numbers}\n"
    assert load(own(tmp_path, more=more)).behaviour(None, "") == {"x": 2, "y": 3, "z": 1}


def test_paths_with_a_plus(tmp_path):
    (tmp_path / "a+b").mkdir()
    one, two = own(tmp_path / "a+b", "c+d.py", "VARIANTS = ('short', 'long')\n", variants=True), own(tmp_path)
    for spec, name in {
        f"{one}:long": "c+d:long", f"{one}+{two}": "c+d+own", f"{two}+{one}:long": "own+c+d:long",
        f"{one}:long+countdown:wide": "c+d:long+countdown:wide", f"{one}:short+{one}:long": "c+d:short+c+d:long",
    }.items():
        assert load(spec).name == name
    with pytest.raises(ValueError, match="there is no such file|unknown task"):
        load(tmp_path / "a+b" / "nowhere.py")
    with pytest.raises(ValueError, match="unknown task ''"):
        load(f"{one}:long+")


def test_two_files_of_one_name(tmp_path):
    (tmp_path / "other").mkdir()
    one, two = own(tmp_path), own(tmp_path / "other")
    for spec in (f"{one}+{two}", f"countdown+{own(tmp_path, 'countdown.py')}"):
        with pytest.raises(ValueError, match="two files have the name of one task; rename one of them"):
            load(spec, "own=x" if "own" in spec else None)
    with pytest.raises(ValueError, match="names one task twice"):
        load(f"{one}+{one}")


@pytest.mark.parametrize("has, lacks", [("verify", "problems"), ("problems", "verify"), ("", "problems and verify")])
def test_a_file_without_the_functions(tmp_path, has, lacks):
    path = tmp_path / "half.py"
    path.write_text(f"def {has}(*_): pass\n" if has else "verify = 3\n")
    with pytest.raises(ValueError, match=f"half.py' lacks {lacks}: need problems"):
        load(path)


def test_an_unknown_split():
    lacking = "task countdown has no split 'dev'; it has train, validation, test, unseen"
    with pytest.raises(ValueError, match=lacking) as e:
        load("countdown").problems("dev")
    assert "--eval-split" in str(e.value)
    with pytest.raises(ValueError, match="task aime has no split 'train'; it has test$"):
        load("aime", "x").problems("train")  # no option chooses another


# ---------------------------------------------------------------- mixtures

MIXED = f"countdown+{EXAMPLE}+countdown:wide"


def test_a_mixture_has_the_problems_of_all():
    task = load(MIXED)
    assert task.name == "countdown+example_task+countdown:wide"
    assert task.splits == ("train", "validation", "test", "unseen")
    parts = [load(spec) for spec in MIXED.split("+")]
    problems = task.problems("test")
    assert problems == [replace(p, task=part.name) for part in parts for p in part.problems("test")]
    assert {p.task for p in task.problems("unseen")} == {"countdown", "countdown:wide"}  # of those that have the split
    with pytest.raises(ValueError, match="split 'dev' is in none of countdown.*; they have train, validation, test, u"):
        task.problems("dev")


def test_a_task_that_runs_programs_must_be_allowed(tmp_path):
    (tmp_path / "coding.py").write_text(
        "from minir1.tasks import Problem, Verdict\nRUNS_CODE = True\n"
        "def problems(split, data): return [Problem('q', 'a')]\n"
        "def verify(problem, text): return Verdict('wrong', {})\n"
    )
    for spec in (f"{tmp_path}/coding.py", f"countdown+{tmp_path}/coding.py"):
        with pytest.raises(ValueError, match="task coding runs programs that the model wrote.*--allow-code"):
            load(spec)
        assert load(spec, allow_code=True).problems("train")


def test_a_mixture_asks_the_task_of_each_problem():
    task, example = load(MIXED), load(EXAMPLE)
    problems = {p.task: p for p in task.problems("test")}
    assert list(problems) == ["countdown", "example_task", "countdown:wide"]
    for name, problem in problems.items():
        assert task.verify(problem, said(problem.reference)).status == "right"
        assert task.verify(problem, said("0")).status == "wrong"
        assert task.final(problem, said(" 1 ")) == "1"
        counting = name != "example_task"
        assert ("tries" in task.behaviour(problem, "1+1=2")) == counting
        assert bool(task.difficulty(problem)) == bool(task.baselines(problem, "")) == counting
    assert task.behaviour(problems["example_task"], "1+1=2") == {"equations": 1}
    assert task.rates == load("countdown").rates
    assert task.documents is task.vocabulary is task.probes is None  # a corpus is of one task
    assert task.recognise("make 24 from 11,3,3").task == "countdown" and task.recognise("What is 12 + 30?") is None
    assert example.recognise is None and load(f"{EXAMPLE}+gsm8k", {"gsm8k": "x"}).recognise is None
    with pytest.raises(ValueError, match="a problem of task ''; the tasks are countdown, example_task"):
        task.verify(example.problems("test")[0], "")


def test_a_mixture_offers_what_one_of_its_tasks_has(tmp_path):
    task = load(f"{EXAMPLE}+{own(tmp_path)}")
    assert task.difficulty is task.baselines is None
    assert [task.behaviour(p, "=") for p in task.problems("test")[-2:]] == [{"equations": 1}, {}]
    assert task.rewrite is None
    upper = own(tmp_path, "upper.py", "def rewrite(problem, text):\n    return text.upper() if text else None\n")
    task = load(f"{EXAMPLE}+{upper}")
    assert [task.rewrite(p, "a") for p in task.problems("test")[-2:]] == ["a", "A"]  # without one, as it is
    assert task.rewrite(task.problems("test")[-1], "") is None


def test_data_of_a_mixture(tmp_path):
    one, two = own(tmp_path, "one.py"), own(tmp_path, "two.py")
    for data in ("one=/x,two=/y=z", {"one": "/x", "two": "/y=z"}):
        assert [p.prompt for p in load(f"{one}+{two}", data).problems("test")] == ["test /x", "test /y=z"]
    assert [p.prompt for p in load(f"{one}+{two}", "two=/y").problems("test")] == ["test None", "test /y"]
    assert load(one, {"one": "/x"}).problems("test")[0].prompt == "test /x"


# ---------------------------------------------------------------- helpers


def test_spread():
    problems = [Problem(str(i), "") for i in range(10)]
    assert spread(problems, 10) == spread(problems, 99) == problems
    assert [p.prompt for p in spread(problems, 4)] == ["0", "2", "5", "7"]
    for most, given in ((0, problems), (3, [])):
        with pytest.raises(ValueError, match=f"{most} of {len(given)} problems: need at least one"):
            spread(given, most)


def test_the_problems_of_several_splits(tmp_path):
    task = load("countdown")
    assert problems_of(task, ("unseen", "test")) == task.problems("unseen") + task.problems("test")
    with pytest.raises(ValueError, match="task countdown has no split 'dev'"):
        problems_of(task, ("test", "dev"))
    empty = load(own(tmp_path, more="def problems(split, data): return []\n"))
    with pytest.raises(ValueError, match="task own: split 'test' has no problems"):
        problems_of(empty, ["test"])


def test_shares_are_even_and_never_change():
    assert share("split 1,2,3") == share("split 1,2,3") and share("a") != share("b")
    values = [share(str(i)) for i in range(2000)]
    assert all(0 <= v < 1 for v in values) and 0.45 < sum(v < 0.5 for v in values) / 2000 < 0.55


def test_tasks_need_no_torch():
    code = "import sys, minir1.tasks as t, minir1.templates; t.load('countdown').problems('train'); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], cwd=ROOT, check=True)


def test_no_task_scores_the_format():
    problem = load("countdown").problems("test")[0]
    for text in ("", said(problem.reference)):
        assert load("countdown").verify(problem, text).scores.keys() == {"accuracy"}
    assert rewards.format_reward(said("1")) == 1
