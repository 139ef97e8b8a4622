"""The task of a model in a chat: found beside its checkpoint, its questions as examples, its verifier beside an answer.

A part of experiments/chat.py and chat_web.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from minir1 import tasks
from minir1.files import read_json
from minir1.judge import judge
from minir1.tasks import Problem, Task

EXAMPLES, SHORT = 4, 80  # questions; characters of a reference that is shown
GENERAL = (  # for a model that no task is known of
    "What is 17 times 23?",
    "Which is larger, 9.11 or 9.9?",
    "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
    "How many letters r are in the word strawberry?",
)
TEXTS = ("Once upon a time", "The three most important", "def fibonacci(n):")  # for one that continues a text


def config_of_run(checkpoint: Path) -> dict:
    """The config.json of a checkpoint's run, as the first that names a task; {} if none does."""
    for folder in (checkpoint, *checkpoint.absolute().parents[:2]):  # the run, checkpoint/ or step-*
        values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if isinstance(values.get("task"), str) and values["task"]:
            return values
    return {}


def of_run(checkpoint: Path) -> tuple[str, str | None] | None:
    """(task, data) that the run of a checkpoint states in its config.json, or None.

    A task that is a .py file is not returned: opening a model must run no code that came with it.
    """
    values = config_of_run(checkpoint)
    spec, data = values.get("task", ""), values.get("data")
    return (spec, data if isinstance(data, str) else None) if spec and ".py" not in spec else None


def budget(checkpoint: Path) -> int:
    """Tokens of an answer, unless the user says otherwise: as in the training of the checkpoint's run, else 1,024."""
    most = config_of_run(checkpoint).get("max_completion_length")
    return most if isinstance(most, int) and most > 0 else 1024


def find(checkpoint: Path, spec: str | None, data: str | None, allow_code: bool) -> Task | None:
    """The task that `spec` names, else the one that the run of the checkpoint states; None if there is none.

    ValueError as `tasks.load` for a task that was named. If the run's own cannot be loaded (it is a .py file, its data
    lie elsewhere, or it runs programs), a line says why, and there is none.
    """
    if spec is not None:
        return tasks.load(spec, data, allow_code=allow_code)
    if (named := of_run(checkpoint)) is None:
        if own := config_of_run(checkpoint).get("task"):
            print(f"the run's task is code, which runs only if you name it, for questions and verdicts: --task {own!r}")
        return None
    try:
        return tasks.load(named[0], data or named[1], allow_code=allow_code)
    except ValueError as error:
        print(f"answers are not judged: {error}")
        return None


def examples(task: Task | None, template: str) -> list[str]:
    """Questions that suit the model: of the task's last split, evenly spread; without a task general ones."""
    if task is None:
        return list(GENERAL if template != "plain" else TEXTS)
    try:
        return [problem.prompt for problem in tasks.spread(task.problems(task.splits[-1]), EXAMPLES)]
    except ValueError as error:  # its data
        print(f"no example questions: {error}")
        return []


def verifier(task: Task | None) -> Callable[[str, str], tuple[str, str] | None]:
    """A function of (question, answer with its tags) that returns (right | wrong | unjudged, why) if the task knows the
    question: it recognises it, or one of its splits lists it. Else the function returns None."""

    @cache
    def listed() -> dict[str, Problem]:
        problems = {}
        for split in task.splits:
            with suppress(ValueError):  # the data may lack a split
                problems |= {problem.prompt.strip(): problem for problem in task.problems(split)}
        return problems

    def verdict(question: str, text: str) -> tuple[str, str] | None:
        known = task and ((task.recognise and task.recognise(question)) or listed().get(question.strip()))
        if not known:
            return None
        judged = judge(task, [(known, text)])[0]
        shown = judged.status == "wrong" and not judged.reason and 0 < len(known.reference) < SHORT
        return judged.status, f"right would be {known.reference}" if shown else judged.reason

    return verdict
