"""humaneval.py: programs in texts, adversarial texts, and the published data, if available."""

import gzip
import json
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clock import quickest

from minir1.tasks import load
from minir1.tasks.humaneval import final, verify

PUBLISHED = Path(os.environ.get("MINIR1_HUMANEVAL", "data/humaneval"))
PROMPT = '''import math
from typing import List


def scale(x: float) -> float:
    """ Twice the number.
    """
    return 2 * x


def largest(numbers: List[int]) -> int:
    """ The largest number, doubled by scale.
    >>> largest([1, 3, 2])
    6
    """
'''
SOLUTION = "    best = max(numbers)\n\n    return scale(best)\n"
TEST = """
METADATA = {'author': 'x'}

def check(candidate):
    assert candidate([1, 3, 2]) == 6
    assert candidate([-5]) == scale(-5)
    assert candidate([4, 4]) == 8, "twice"
"""
RECORD = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "entry_point": "largest",
    "canonical_solution": SOLUTION,
    "test": TEST,
}
WHOLE = "def largest(numbers):\n" + SOLUTION


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "HumanEval.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    (found,) = load("humaneval", path, allow_code=True).problems("test")
    return found


def statuses(problem, texts):
    """The verdict on each text; texts with the same program are run once."""
    by_program = {final(problem, text): text for text in texts}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = dict(zip(by_program, pool.map(lambda text: verify(problem, text).status, by_program.values())))
    return [found[final(problem, text)] for text in texts]


# ---- files


def test_layouts(tmp_path):
    lines = json.dumps(RECORD) + "\n"
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "hub" / "openai_humaneval").mkdir(parents=True)
    (tmp_path / "hub" / "openai_humaneval" / "test-00000-of-00001.jsonl").write_text(lines)
    for data in (tmp_path, tmp_path / "HumanEval.jsonl.gz", tmp_path / "hub"):
        (found,) = load("humaneval", data, allow_code=True).problems("test")
        assert (found.prompt, found.reference, found.solution) == (PROMPT, SOLUTION, SOLUTION)
        (found,) = load("humaneval:chat", data, allow_code=True).problems("test")
        assert f"```python\n{PROMPT.strip()}\n```" in found.prompt and found.solution.startswith(
            "```python\nimport math"
        )


@pytest.mark.parametrize(
    "content, message",
    [("", "holds no problems"), ('{"prompt": "x"}', "task_id.*missing"), ("[1]", "need an object"), ("{", "JSON")],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "HumanEval.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load("humaneval", tmp_path, allow_code=True).problems("test")


def test_code_must_be_allowed():
    with pytest.raises(ValueError, match="--allow-code"):
        load("humaneval", "x")


# ---- programs in texts

RIGHT = {
    "continuation": SOLUTION,
    "continuation and more": SOLUTION + "\n\ndef other():\n    return 1\n\nprint(largest([1]))\nif x:\n    1 / 0",
    "continuation and prose": SOLUTION + "\nThis takes the maximum.\n\n    It is linear.",
    "continuation and a fence": SOLUTION + "```\n\nDone.",
    "continuation and a comment": SOLUTION + "\n# test\nassert False",
    "continuation without end": SOLUTION.rstrip(),
    "continuation with an empty line first": "\n" + SOLUTION,
    "brackets at the margin": "    return scale(max(\nnumbers\n))\n".replace("\nnumbers", "\n    numbers"),
    "Windows lines": SOLUTION.replace("\n", "\r\n"),
    "fence": f"Sure:\n\n```python\n{WHOLE}```\nIt works.",
    "fence without language": f"```\n{WHOLE}```",
    "fence of another name": f"```py\n{WHOLE}```",
    "tildes": f"~~~python\n{WHOLE}~~~",
    "unclosed fence": f"```python\n{WHOLE}",
    "two fences, the last uses it": f"```python\n{WHOLE}```\nUsage:\n```python\nprint(largest([1]))\n```\n```\n6\n```",
    "a corrected program": f"```python\ndef largest(x):\n    return 0\n```\nNo, better:\n```python\n{WHOLE}```",
    "body in a fence": f"The body:\n```python\n{SOLUTION}```",
    "prompt and body in a fence": f"```python\n{PROMPT}{SOLUTION}```",
    "fence in a list": "1. So:\n   ```python\n" + "".join(f"   {line}\n" for line in WHOLE.splitlines()) + "   ```",
    "fences within a string": f"```python\n{WHOLE.replace('best =', 'fence = ' + repr('```') + '; best =')}```",
    "thinking": f"<think>def largest(x): pass\n```python\ndef largest(x): return 1\n```</think>\n```python\n{WHOLE}```",
    "thinking opened by the template": f"hm ```python\nx\n```</think>```python\n{WHOLE}```",
    "tags": f"<think>x</think><answer>\n```python\n{WHOLE}```\n</answer>",
    "tags without fence": f"<think>x</think><answer>{WHOLE}</answer>",
    "tags around a continuation": f"<think>x</think><answer>\n{SOLUTION}</answer>",
    "whole function": WHOLE,
    "whole function with prose": f"Here is the function:\n\n{WHOLE}\nThis is linear in the length.",
    "whole function with helpers": (
        f"import math\nK = 2\n\ndef help(x):\n    return K * x\n\n{WHOLE.replace('scale', 'help')}\nprint(largest([2]))"
    ),
    "a lambda": "```python\nlargest = lambda numbers: scale(max(numbers))\n```",
    "future imports": f"```python\nfrom __future__ import annotations\n{WHOLE}```",
    "prints": f"```python\nprint('x' * 1000)\n{WHOLE}```",
}  # fmt: skip
BODIES = {
    "nothing": ["", "    pass", "    return None", "    ...", "    return", "\n\n"],
    "a constant": [f"    return {value}" for value in (6, 8, True, "'6'", [6], 0)],
    "another value": [
        "    return max(numbers)", "    return scale(min(numbers))", "    return 2 * numbers[0]",
        "    return str(scale(max(numbers)))", "    return scale(max(numbers)) + 1", "    return -scale(max(numbers))",
        "    return (scale(max(numbers)),)", "    print(scale(max(numbers)))",
    ],
    "no Python": ["    return (", "    retrun 6", "    if True:", "  return 6\n      x", "    return 6 6"],
    "errors": [
        "    raise ValueError", "    return undefined", "    return 1 / 0", "    return largest(numbers)",
        "    assert False",
        "    import numpy_that_is_not; return 6", "    return int(input())",
    ],
    "ends": [
        "    import sys; sys.exit(0)", "    import os; os._exit(0)", "    raise SystemExit", "    quit()",
        "    raise KeyboardInterrupt",
    ],
    "forgeries": [
        "    class A:\n        def __eq__(self, o): return True\n    return A()",
        "    class A(int):\n        def __eq__(self, o): return True\n    return A(3)",
        "    import builtins; builtins.AssertionError = SystemExit; return 1",
        "    print('[\"passed\", \"\"]'); return 0",
        "    global check; check = lambda f: None; return 0",
        "    return type('A', (), {'__eq__': lambda *a: True})()", "    return float('nan')", "    return scale",
        "    return NotImplemented", "    yield 6", "    global scale; scale = lambda x: 6; return 6",
    ],
}  # fmt: skip
TEXTS = {  # of these bodies, texts that hold no right program either
    "continuation": "{}",
    "fence": "Sure.\n```python\ndef largest(numbers):\n{}\n```",
    "unclosed fence": "```\ndef largest(numbers):\n{}\n",
    "tags": "<think>so</think><answer>\n```python\ndef largest(numbers):\n{}\n```\n</answer>",
}
FENCE = "```python\n{}\n```".format
NO_PROGRAM = {
    "open thinking": [f"<think>{WHOLE}", f"<think>x</think><think>{FENCE(WHOLE)}", f"a</think><think>{SOLUTION}"],
    "only in the thinking": [f"<think>{FENCE(WHOLE)}</think>", f"<think>{SOLUTION}</think>Done.", f"{WHOLE}</think>"],
    "tags that do not match": [
        f"<answer>{WHOLE}", f"{WHOLE}</answer>", f"<answer>{WHOLE}</answer><answer>{WHOLE}</answer>",
        f"</answer>{WHOLE}<answer>", f"<answer><answer>{WHOLE}</answer></answer>",
    ],
    "outside the tags": [f"{FENCE(WHOLE)}<answer>see above</answer>", f"<answer></answer>{WHOLE}"],
    "prose": ["The answer is 6.", "max", "I cannot do this.", "largest", "def", "6", "\\boxed{6}", "#### 6"],
    "another function": [FENCE(WHOLE.replace("largest", name)) for name in ("Largest", "largest_", "max_", "solve")],
    "a method": [FENCE("class Solution:\n" + textwrap.indent(WHOLE, "    "))],
    "replaced later": [FENCE(f"{WHOLE}\nlargest = {value}") for value in ("None", "6", "lambda x: 6", "print", "[]")],
    "withdrawn": [f"{FENCE(WHOLE)}\n{FENCE(f'def largest(x): return {value}')}" for value in (0, 6, "x", "None")],
    "truncated": [f"```python\n{WHOLE[:n]}" for n in range(12, len(WHOLE) - 20, 9)],
    "truncated continuation": [SOLUTION[:n] for n in range(0, 45, 5)],
    "too long": [WHOLE + "#" * 10**6, "```python\n" * 10**5, "    " * 10**5],
    "tests redefined": [FENCE(f"{PROMPT}    return 0\ndef check(candidate): pass")],
    "comments": [FENCE(f"# {WHOLE.splitlines()[0]}\n#    return 6"), FENCE(f'"""\n{WHOLE}"""')],
    "odd characters": [
        "\0" + WHOLE, WHOLE.replace("best", "b\u200best"), WHOLE.replace(":", "："), "\ufeff\ufeff" + WHOLE, "\ud800",
    ],
}  # fmt: skip


@pytest.mark.parametrize("group", range(2))
def test_right_programs(problem, group):
    names = list(RIGHT)[group::2]
    assert dict(zip(names, statuses(problem, [RIGHT[name] for name in names]))) == dict.fromkeys(names, "right")


def gallery() -> list[str]:
    bodies = [body for kind in BODIES.values() for body in kind]
    shapes = list(TEXTS.values())  # every other body without the first, which makes a program of its own to run
    shaped = [shape.replace("{}", body) for i, body in enumerate(bodies) for shape in shapes[i % 2 :]]
    return shaped + [text for kind in NO_PROGRAM.values() for text in kind]


def test_nothing_wrong_is_called_right(problem):
    texts = gallery()
    assert len(texts) >= 200
    assert [text for text, status in zip(texts, statuses(problem, texts)) if status != "wrong"] == []


@pytest.mark.parametrize(
    "piece",
    ["a", " ", "\n", "```\n", "    x\n", "def largest", "<think>", "</answer>", "\t", "largest : ", "#\n", "(", "é"],
)
def test_long_texts_take_little_time(problem, piece):
    text = piece * (10**6 // len(piece))
    assert final(problem, text) is None
    assert quickest(final, problem, text) < 0.25  # about 0.05
    assert quickest(final, problem, text[:60000]) < 0.25


def test_an_indented_fence_is_no_body(problem):
    fenced = "   ```python\n" + WHOLE + "```"
    assert "```" not in final(problem, fenced) and statuses(problem, [fenced]) == ["right"]


def test_a_continuation_ends_with_the_function(problem):
    assert final(problem, SOLUTION + "\nx = 1\n").endswith("return scale(best)\n\n")
    assert final(problem, RIGHT["continuation and more"]) == final(problem, SOLUTION + "\n")


# ---- as published


@pytest.mark.skipif(not PUBLISHED.exists(), reason="set MINIR1_HUMANEVAL to the folder with HumanEval.jsonl.gz")
def test_published_solutions_pass_and_empty_ones_do_not():
    task, chat = (load(f"humaneval:{variant}", PUBLISHED, allow_code=True) for variant in ("complete", "chat"))
    problems = task.problems("test")
    right = [(p, p.reference) for p in problems] + [(p, p.solution) for p in chat.problems("test")[::8]]
    wrong = [(p, text) for p in problems for text in ("", "    pass")] + [(p, "    return None") for p in problems[::4]]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = list(pool.map(lambda case: task.verify(*case).status, right + wrong))
    assert len(problems) == 164 and found == ["right"] * len(right) + ["wrong"] * len(wrong)
