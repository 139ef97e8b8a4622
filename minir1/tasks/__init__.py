"""Tasks, which provide problems and judge answers. None imports torch.

A task is a module with two functions:

    problems(split, data) -> list[Problem]   the problems of a split; `data` is the value of --data, or None
    verify(problem, text) -> Verdict         whether the model's text, tags included, is right

These two are enough to train on a task and to evaluate it. Write them in a file of your own and pass its path
(`--task my_task.py`; docs/example_task.py is such a file), or put the file into this folder and pass its name.
Scripts also use and report the following, if the module defines it:

    SPLITS     the names of its splits; by default ("train", "test")
    VARIANTS   what may follow a colon, as in `countdown:wide`, the default first. Then `problems`, `documents`,
               `vocabulary`, `probes` and `recognise` also take the keyword argument `variant`
    DATA       a sentence on what --data must be, if the task needs it, or None if it takes none. Without it,
               --data may be given or not
    RUNS_CODE  True: verify runs programs that the model wrote (minir1/sandbox.py), so the task needs --allow-code
    behaviour(problem, text) -> dict[str, float]   counts of what the model does in its thinking
    RATES      {"repeats": "tries"}: the count `repeats` is reported per try; counts not named here, per answer
    attempts(problem, text) -> list[tuple[int, int, bool]]   the tries in the thinking that get a verdict: at which
                                                   characters each starts and its verdict follows, and whether it
                                                   is really a solution
    difficulty(problem) -> str                     the group in which the problem is reported, such as "hard"
    baselines(problem, text) -> dict[str, float]   the chance that other methods, by name, solve the problem with as
                                                   much work as this text shows
    final(problem, text) -> str | None             the answer as a majority vote compares it, None if there is none;
                                                   by default the text between the answer tags, without white space
    same(problem, a, b) -> bool                    whether two answers of `final` are equivalent; by default equal text
    recognise(question) -> Problem | None          the problem that a text asks, where the text alone tells it, listed
                                                   in `problems` or not: a chat shows the verdict on its answer
    rewrite(problem, text) -> str | None           the text in the form that a reader wants, with the same content; None
                                                   if it cannot be rewritten
    documents(seed, **mix) -> Iterator[str]        an endless synthetic corpus to pre-train a tiny base on
    vocabulary() -> tuple[Sequence[str], int]      words and largest number of that corpus; each is one token
    probes() -> list[list[tuple[str, str]]]        texts that measure what the model learned from the corpus, in
                                                   pieces (text, label); the model must predict each piece with a
                                                   label, a single token, from the pieces before it

`verify` must be a pure function: several threads call it at once. What may take long or never end belongs into another
process with a time limit: `workers.call` (minir1/workers.py) runs a function there.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Literal

from minir1 import rewards, sandbox

TEXTS = ("prompt", "reference", "language", "level", "task", "subject", "solution")  # of a problem
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair; JSON may hold it, but no file in UTF-8
SOURCE = re.compile(r"(.*?\.py|[^:]*)(?::(.*))?", re.DOTALL)  # a name or path, and the variant


@dataclass(frozen=True)
class Problem:
    """A question with a checkable answer."""

    prompt: str  # the question, without a chat template
    reference: str  # a right answer
    language: str = "en"  # of prompt and reference
    level: str = "default"  # difficulty, named by the task
    task: str = ""  # in a mixture of tasks, the name of its task
    subject: str = ""  # the field of the question, such as "Algebra"
    solution: str = ""  # a worked solution as published, which shows the answer: for few-shot prompts
    extra: Mapping[str, object] = field(default_factory=dict, hash=False, repr=False)  # what else `verify` needs


@dataclass(frozen=True)
class Verdict:
    """A verifier's result for one text.

    Malformed, truncated and false answers are all "wrong". "unjudged": the verifier itself failed (timed out, could not
    start a sandbox). Count this separately: as a wrong answer it would hide the failure.
    """

    status: Literal["right", "wrong", "unjudged"]
    scores: dict[str, float]  # name of a reward, such as accuracy -> value
    reason: str = ""  # in words: why it could not be judged, or why it is wrong


@dataclass(frozen=True)
class Task:
    """A task as `load` returns it: data and variant are bound, and what the module does not define is None."""

    name: str
    splits: tuple[str, ...]
    problems: Callable[[str], list[Problem]]  # of a split
    verify: Callable[[Problem, str], Verdict]
    final: Callable[[Problem, str], str | None]
    rates: Mapping[str, str] = field(default_factory=dict)  # a count of `behaviour` -> the count it is divided by
    same: Callable[[Problem, str, str], bool] = lambda problem, a, b: a == b  # of two final answers
    behaviour: Callable[[Problem, str], dict[str, float]] | None = None
    attempts: Callable[[Problem, str], list[tuple[int, int, bool]]] | None = None
    difficulty: Callable[[Problem], str] | None = None
    baselines: Callable[[Problem, str], dict[str, float]] | None = None
    recognise: Callable[[str], Problem | None] | None = None
    rewrite: Callable[[Problem, str], str | None] | None = None
    documents: Callable[..., Iterator[str]] | None = None  # (seed, **mix)
    vocabulary: Callable[[], tuple[Sequence[str], int]] | None = None
    probes: Callable[[], list[list[tuple[str, str]]]] | None = None


def load(
    spec: str | Path, data: str | Path | Mapping[str, str | Path] | None = None, *, allow_code: bool = False
) -> Task:
    """The task that `spec` names.

    spec: a name (`gsm8k`), with a variant (`countdown:wide`), the path of a .py file, or several of these joined by
    `+`. data: what the task reads; for several tasks a mapping from their names, without variants, or the same as a
    string, `gsm8k=PATH,other=PATH`. allow_code: the task may run programs that a model wrote; what confines them is
    printed. ValueError for an unknown task or variant, a file without the two functions, data that is missing, not
    needed, or for a task not named here, and a task that runs programs without `allow_code`.
    """
    named = [SOURCE.fullmatch(part).groups() for part in _parts(str(spec))]
    modules = [_module(source) for source, _ in named]
    names = [Path(source).stem if source.endswith(".py") else source for source, _ in named]
    if len(set(names)) < len({source for source, _ in named}):
        raise ValueError(f"task {str(spec)!r}: two files have the name of one task; rename one of them")
    sources = _data_by_name(names, data)
    variants = [variant for _, variant in named]
    running = [name for name, module in zip(names, modules) if getattr(module, "RUNS_CODE", False)]
    if running and not allow_code:
        raise ValueError(f"task {running[0]} runs programs that the model wrote, in a sandbox: allow it, --allow-code")
    if running:
        print(sandbox.protection())
    tasks = [_bind(name, *rest, sources.get(name)) for name, *rest in zip(names, modules, variants)]
    return tasks[0] if len(tasks) == 1 else _mixture(tasks)


def spread(problems: Sequence[Problem], most: int) -> list[Problem]:
    """All problems, or `most` of them, evenly spread over the sequence. ValueError if that leaves none."""
    n = len(problems)
    if most < 1 or not n:
        raise ValueError(f"{most} of {n} problems: need at least one")
    return list(problems) if n <= most else [problems[i * n // most] for i in range(most)]


def problems_of(task: Task, splits: Iterable[str]) -> list[Problem]:
    """The problems of several splits. ValueError for a split that the task lacks, or that has no problems."""
    listed = {split: task.problems(split) for split in splits}
    if empty := [split for split, problems in listed.items() if not problems]:
        raise ValueError(f"task {task.name}: split {empty[0]!r} has no problems")
    return [problem for problems in listed.values() for problem in problems]


def share(text: str) -> float:
    """A hash of the text in [0, 1), equal on every machine: a share p of all texts is below p."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _parts(spec: str) -> list[str]:
    """The tasks of a spec. A + in the path of a file divides nothing."""
    pieces = spec.split("+")
    starts = ["+".join(pieces[:n]) for n in range(1, len(pieces) + 1)]
    first = next((start for start in starts if Path(SOURCE.fullmatch(start)[1]).is_file()), pieces[0])
    return [first] + (_parts(spec[len(first) + 1 :]) if first != spec else [])


def _module(source: str) -> ModuleType:
    """The module of a task: a .py file, or a name in this folder."""
    if not source.endswith(".py"):
        modules = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
        tasks = {name: module for name, module in modules.items() if not _lacking(module)}
        if source not in tasks:
            allowed = f"{', '.join(sorted(tasks))}, a path that ends in .py, or several of these joined by +"
            raise ValueError(f"unknown task {source!r}; allowed: {allowed}")
        return tasks[source]
    if not Path(source).is_file():
        raise ValueError(f"task {source!r}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"task_{Path(source).stem}", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    if lacking := _lacking(module):
        raise ValueError(f"task {source!r} lacks {' and '.join(lacking)}: need problems(split, data) and "
                         "verify(problem, text)")
    return module


def _lacking(module: ModuleType) -> list[str]:
    return [name for name in ("problems", "verify") if not callable(getattr(module, name, None))]


def _data_by_name(names: list[str], data) -> dict:
    """Name of a task -> its data. ValueError for data of a task that is not among `names`."""
    if data is None or (len(names) == 1 and not isinstance(data, Mapping)):
        return {names[0]: data}
    if not isinstance(data, Mapping):
        pairs = [entry.partition("=") for entry in str(data).split(",")]
        if not all(path for _, _, path in pairs):
            raise ValueError(f"data of several tasks: name=path,name=path, not {str(data)!r}")
        data = {name.strip(): path for name, _, path in pairs}
    if unknown := sorted(data.keys() - set(names)):
        raise ValueError(f"data for {', '.join(unknown)}; the tasks are {', '.join(dict.fromkeys(names))}")
    return dict(data)


def _is_text(value) -> bool:
    """Whether a value is a string that a file can hold: without halves of surrogate pairs."""
    return isinstance(value, str) and not SURROGATE.search(value)


def _are_numbers(value) -> bool:
    """Whether a value is a mapping of names to finite numbers."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return all(isinstance(number, Real) and isfinite(number) for number in value.values())


NUMBERS, TEXT = (_are_numbers, "no mapping of names to finite numbers"), (_is_text, "no text")
TEXT_OR_NONE = (lambda value: value is None or _is_text(value), "neither text nor None")
RETURNED = {  # by an optional function: a condition, and what a value is that does not meet it
    "behaviour": NUMBERS, "attempts": (lambda value: isinstance(value, Iterable), "no list"), "difficulty": TEXT,
    "baselines": NUMBERS, "rewrite": TEXT_OR_NONE, "final": TEXT_OR_NONE, "same": (lambda _: True, ""),
}  # fmt: skip


def _checked(task: str, key: str, function: Callable, *args):
    """What an optional function of a task returns. Errors name both, also that for what it must not return."""
    try:
        value = function(*args)
    except Exception as error:
        raise RuntimeError(f"task {task}: {key} raises {error!r}") from error
    meets, what = RETURNED[key]
    if not meets(value):
        raise ValueError(f"task {task}: {key} returns {str(value)[:60]!r}, which is {what}")
    return value


def _bind(name: str, module: ModuleType, variant: str | None, data) -> Task:
    for key in ("SPLITS", "VARIANTS"):
        if not isinstance(value := getattr(module, key, ()), (tuple, list)):
            raise ValueError(f"task {name}: {key} = {value!r}: must be a tuple of names, such as ('train',)")
    variants, needs = getattr(module, "VARIANTS", ()), getattr(module, "DATA", "")
    if variant is not None and variant not in variants:
        raise ValueError(f"task {name} has no variant {variant!r}; it has {', '.join(variants) or 'none'}")
    if needs and data is None:
        raise ValueError(f"task {name} needs data: {needs}")
    if needs is None and data is not None:
        raise ValueError(f"task {name} takes no data, but got {str(data)!r}")
    full_name = name if variant is None else f"{name}:{variant}"
    splits = tuple(getattr(module, "SPLITS", ("train", "test")))
    bound = {"variant": variant or variants[0]} if variants else {}

    def problems(split: str) -> list[Problem]:
        if split not in splits:
            raise ValueError(f"task {full_name} has no split {split!r}; it has {', '.join(splits)}{_other(split)}")
        listed = module.problems(split, data, **bound)
        listed = list(listed) if isinstance(listed, Iterable) else [listed]
        for item in listed:
            if not isinstance(item, Problem):
                raise ValueError(f"task {full_name}: problems returns {str(item)[:60]!r}, which is no Problem")
            if wrong := [name for name in TEXTS if not _is_text(getattr(item, name))]:
                what = f"{wrong[0]} = {getattr(item, wrong[0])!r:.60}"
                raise ValueError(f"task {full_name}: problems returns a Problem with {what}, which is no text")
        return listed

    def verify(problem: Problem, text: str) -> Verdict:
        verdict = module.verify(problem, text)
        if not isinstance(verdict, Verdict) or verdict.status not in ("right", "wrong", "unjudged"):
            raise ValueError(f"task {full_name}: verify returns {str(verdict)[:60]!r}, which is no Verdict")
        if not _is_text(verdict.reason):
            raise ValueError(f"task {full_name}: verify returns reason = {verdict.reason!r:.60}, which is no text")
        if not _are_numbers(verdict.scores):
            what = f"scores = {verdict.scores!r:.60}, which is {NUMBERS[1]}"
            raise ValueError(f"task {full_name}: verify returns {what}")
        return verdict

    optional = {key: getattr(module, key) for key in RETURNED if hasattr(module, key)}
    of_text = {key: partial(_checked, full_name, key, function) for key, function in optional.items()}
    of_variant = {key: getattr(module, key, None) for key in ("documents", "vocabulary", "probes", "recognise")}
    of_variant = {key: function and partial(function, **bound) for key, function in of_variant.items()}
    rates = getattr(module, "RATES", {})
    return Task(full_name, splits, problems, verify, rates=rates, **{"final": _final} | of_text, **of_variant)


def _other(split: str) -> str:
    """How a script is told to use another split than this one, which the task lacks; `train` is no option of theirs."""
    return "" if split == "train" else ": choose one of these, --eval-split (or --split, whichever the script has)"


def _final(problem: Problem, text: str) -> str | None:
    answer = rewards.answer(text)
    return None if answer is None else "".join(answer.split())


def _mixture(tasks: list[Task]) -> Task:
    """The problems of all tasks, each judged by its own task; a split holds the problems of the tasks that have it.

    So a benchmark that is only a test set takes no part in training. An optional function is defined if one of the
    tasks has it. For problems of a task without it, `behaviour` and `baselines` return {}, `attempts` [], `difficulty`
    "", and `rewrite` the text as it is. A mixture has no corpus.
    """
    by_name = {task.name: task for task in tasks}
    name = "+".join(task.name for task in tasks)
    if len(by_name) < len(tasks):
        raise ValueError(f"task {name!r} names one task twice")
    splits = tuple(dict.fromkeys(split for task in tasks for split in task.splits))

    def problems(split: str) -> list[Problem]:
        if split not in splits:
            raise ValueError(f"split {split!r} is in none of {name}; they have {', '.join(splits)}{_other(split)}")
        having = [task for task in tasks if split in task.splits]
        return [replace(problem, task=task.name) for task in having for problem in task.problems(split)]

    def dispatch(key: str, otherwise: Callable | None = None):
        if all(getattr(task, key) is None for task in tasks):
            return None

        def call(problem: Problem, *text: str):
            if problem.task not in by_name:
                raise ValueError(f"a problem of task {problem.task!r}; the tasks are {', '.join(by_name)}")
            return (getattr(by_name[problem.task], key) or otherwise)(problem, *text)

        return call

    def recognise(question: str) -> Problem | None:
        asked = ((task, task.recognise(question)) for task in tasks if task.recognise)
        return next((replace(problem, task=task.name) for task, problem in asked if problem), None)

    rates = {count: per for task in tasks for count, per in task.rates.items()}
    optional = {key: dispatch(key, lambda *_: {}) for key in ("behaviour", "baselines")}
    optional["attempts"] = dispatch("attempts", lambda *_: [])
    optional["difficulty"] = dispatch("difficulty", lambda _: "")
    optional["rewrite"] = dispatch("rewrite", lambda _, text: text)
    optional["recognise"] = recognise if any(task.recognise for task in tasks) else None
    return Task(name, splits, problems, dispatch("verify"), dispatch("final"), rates, dispatch("same"), **optional)
