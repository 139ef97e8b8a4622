"""mbpp.py: published layouts, programs in texts, and adversarial texts. The records are made up, in the real format."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from clock import quickest
from test_humaneval import BODIES

from minir1.tasks import load, mbpp
from minir1.tasks.mbpp import final, verify

LARGEST = {
    "text": "Write a function to find the largest number, doubled.",
    "code": "import math\r\ndef scale(x):\r\n  return 2 * x\r\ndef largest(numbers):\r\n  return scale(max(numbers)) ",
    "task_id": 11,
    "test_setup_code": "",
    "test_list": [
        "assert largest([1, 3, 2]) == 6",
        "assert largest([-5])==-10",
        "assert math.isclose(largest([4, 4]), 8)",
    ],
    "challenge_test_list": ["assert largest([0]) == 1"],
}
PAIRS = {
    "text": "Write a function to find the longest chain which can be formed from the given set of pairs.",
    "code": "class Pair(object): \r\n\tdef __init__(self, a, b): \r\n\t\tself.a = a \r\n\t\tself.b = b \r\n"
    "def chain(arr, n): \r\n\treturn sum(p.b > p.a for p in arr[:n])",
    "task_id": 601,
    "test_setup_code": "",
    "test_list": [
        "assert chain([Pair(5, 24), Pair(15, 25),Pair(60, 50)], 3) == 2",
        "assert chain([Pair(1, 2)], 1) == 1",
    ],
    "challenge_test_list": [],
}
TREE = {
    "text": "Write a function to find the height of a binary tree.",
    "code": "class Node: \r\n\tdef __init__(self, data): \r\n\t\tself.data = data \r\n\t\tself.left = None\r\n"
    "\t\tself.right = None\r\n"
    "def height(node): \r\n\tif node is None: \r\n\t\treturn 0\r\n"
    "\treturn 1 + max(height(node.left), height(node.right))",
    "task_id": 3,
    "test_setup_code": "root = Node(1) \r\nroot.left = Node(2) \r\nroot.left.right = Node(4)\r\nroot1 = Node(1)",
    "test_list": ["assert (height(root)) == 3", "assert (height(root1)) == 1", "assert height(root.left) == 2"],
    "challenge_test_list": [],
}
SUM = {
    "text": "Write a python function to find the sum of common divisors of two given numbers.",
    "code": "def sum(a,b):\n    s = 0\n    for i in range (1, min(a, b) + 1):\n"
    "        if (a % i == 0 and b % i == 0):\n            s += i\n    return s",
    "task_id": 511,
    "test_setup_code": "",
    "test_list": ["assert sum(10,15) == 6", "assert sum(100,150) == 93"],
    "challenge_test_list": [],
}  # fmt: skip
SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb", "task_id": 12,
    "prompt": "Write a function to get an angle.",
    "code": "import cmath\ndef angle(a, b):\n  return cmath.phase(a+b)", "test_imports": ["import math"],
    "test_list": ["assert math.isclose(angle(0,1j), 1.5707963267948966, rel_tol=0.001)"],
}  # fmt: skip
RECORDS = [LARGEST, PAIRS, TREE, SUM]
WHOLE = LARGEST["code"].replace("\r", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "mbpp.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture(scope="module")
def problem(data):
    (found,) = load("mbpp", data, allow_code=True).problems("test")
    return found


def statuses(problem, texts):
    """The verdict on each text; texts with the same program are run once."""
    by_program = {final(problem, text): text for text in texts}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = dict(zip(by_program, pool.map(lambda text: verify(problem, text).status, by_program.values())))
    return [found[final(problem, text)] for text in texts]


# ---- files


def test_splits_are_those_of_the_paper(data):
    task = load("mbpp", data, allow_code=True)
    names = {split: [p.extra["names"] for p in task.problems(split)] for split in task.splits}
    assert names == {
        "train": [["Pair", "chain"]],
        "validation": [["sum"]],
        "test": [["largest"]],
        "prompt": [["Node", "height"]],
    }


def test_published_programs_pass_and_others_do_not(data):
    task = load("mbpp", data, allow_code=True)
    for split in task.splits:
        (p,) = task.problems(split)
        for text in (
            p.reference,
            p.solution,
            f"[BEGIN]\n{p.solution}",
            f"```python\n{p.reference}\n```",
            p.prompt + p.solution,
        ):
            assert task.verify(p, text).status == "right", (split, text)
        for text in (
            "",
            p.prompt,
            p.reference.replace("return", "pass;"),
            p.reference.replace("return ", "return 1 + "),
        ):
            assert task.verify(p, text).status == "wrong", (split, text)


def test_prompts(data):
    (p,) = load("mbpp", data, allow_code=True).problems("test")
    assert p.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to find the largest number, "
        "doubled. Your code should pass these tests:\n\nassert largest([1, 3, 2]) == 6\nassert largest([-5])==-10\n"
        "assert math.isclose(largest([4, 4]), 8)\n[BEGIN]\n"
    )
    assert p.solution == f"{WHOLE.strip()}\n[DONE]"
    (p,) = load("mbpp:chat", data, allow_code=True).problems("test")
    assert p.prompt.endswith("```python block, without the tests.") and p.solution.startswith("```python\nimport math")


def test_other_layouts(tmp_path, data):
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([SANITIZED]))
    for path in (tmp_path, tmp_path / "sanitized-mbpp.json"):
        (p,) = load("mbpp", path, allow_code=True).problems("test")
        assert p.prompt.startswith(mbpp.TASK[:40]) and verify(p, p.reference).status == "right"
        assert verify(p, "import math\ndef angle(a, b): return math.pi").status == "wrong"
    (tmp_path / "hub" / "full").mkdir(parents=True)
    for split, record in zip(("test", "train", "prompt", "validation"), RECORDS):
        (tmp_path / "hub" / "full" / f"{split}-00000-of-00001.jsonl").write_text(json.dumps(record))
    task = load("mbpp", tmp_path / "hub", allow_code=True)
    assert [len(task.problems(split)) for split in task.splits] == [1] * 4
    (p,) = load("mbpp", data.parent, allow_code=True).problems("train")
    assert p.extra["task_id"] == 601


def without(record, **changed):
    return json.dumps({key: value for key, value in (record | changed).items() if value is not None})


@pytest.mark.parametrize("content, message", [
    ("", "no problems of the split 'test'"), (without(PAIRS), "no problems of the split"),
    (without(LARGEST, text=None), "need task_id"),
    (without(LARGEST, task_id="11"), "need task_id"), (without(LARGEST, test_list="assert"), "need task_id"),
    (without(LARGEST, code="def ("), "no Python"),
    (without(LARGEST, code="def other(): pass"), "nothing that the code defines"),
    (without(LARGEST, test_list=[]), "nothing that the code defines"),
])  # fmt: skip
def test_other_files(tmp_path, content, message):
    (tmp_path / "mbpp.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load("mbpp", tmp_path, allow_code=True).problems("test")


# ---- programs in texts

RIGHT = {
    "the program": WHOLE,
    "up to [DONE]": f"{WHOLE}\n[DONE]\n\nYou are an expert\n[BEGI",
    "from [BEGIN]": f"largest\n[BEGIN]\n{WHOLE}\n[DONE]",
    "fence": f"Sure:\n```python\n{WHOLE}\n```\nDone.",
    "fence in [BEGIN]": f"[BEGIN]\n```python\n{WHOLE}\n```\n[DONE]",
    "two fences": f"```python\n{WHOLE}\n```\n```python\nprint(largest([1]))\n```",
    "corrected": f"```python\ndef largest(x): return 0\n```\nNo:\n```python\n{WHOLE}\n```",
    "prose around it": f"Here it is.\n\n{WHOLE}\n\nIt takes the maximum.",
    "its own tests": f"{WHOLE}\n\nprint(largest([1]))\nassert largest([1]) == 2",
    "thinking and tags": f"<think>def largest(x): return 0</think><answer>```python\n{WHOLE}\n```</answer>",
    "another way": "def largest(xs):\n    return 2 * sorted(xs)[-1]",
}
NO_PROGRAM = {
    "open thinking": [f"<think>{WHOLE}", f"x</think><think>{WHOLE}"],
    "only in the thinking": [f"<think>{WHOLE}</think>", f"<think>```python\n{WHOLE}\n```</think>Done."],
    "tags that do not match": [
        f"<answer>{WHOLE}",
        f"{WHOLE}</answer>",
        f"<answer>{WHOLE}</answer><answer>{WHOLE}</answer>",
    ],
    "after [DONE]": [f"[DONE]\n{WHOLE}", f"def largest(x): return 0\n[DONE]\n{WHOLE}"],
    "prose": [
        "6",
        "largest",
        "I cannot.",
        "def largest",
        "\\boxed{6}",
        "max(numbers) * 2",
        "assert largest([1, 3, 2]) == 6",
    ],
    "another function": [WHOLE.replace("largest", name) for name in ("Largest", "largest_", "solve", "maximum")],
    "replaced later": [f"{WHOLE}\nlargest = {value}\n" for value in ("None", "6", "lambda x: 6", "print", "[]", "abs")],
    "withdrawn": [
        f"```python\n{WHOLE}\n```\n```python\ndef largest(x): return {value}\n```" for value in (0, 6, -10, "x")
    ],
    "truncated": [WHOLE[:n] for n in range(20, len(WHOLE) - 12, 5)],
    "too long": [WHOLE + "\n" + "#" * 10**6],
    "odd characters": [WHOLE.replace("max", "\0max"), WHOLE.replace(":", "："), WHOLE.replace("max", "\ud800max")],
}
SHAPES = ["def largest(numbers):\n{}\n", "```python\ndef largest(numbers):\n{}\n```",
          "def largest(numbers):\n{}\n[DONE]",
          "<think>so</think><answer>\n```\ndef largest(numbers):\n{}\n```\n</answer>"]  # fmt: skip


def test_right_programs(problem):
    assert dict(zip(RIGHT, statuses(problem, RIGHT.values()))) == dict.fromkeys(RIGHT, "right")


def test_nothing_wrong_is_called_right(problem):
    bodies = [body for kind in BODIES.values() for body in kind]
    texts = [shape.replace("{}", body) for body in bodies for shape in SHAPES]
    texts += [text for kind in NO_PROGRAM.values() for text in kind]
    assert len(texts) >= 200
    assert [text for text, status in zip(texts, statuses(problem, texts)) if status != "wrong"] == []


def test_a_class_of_the_program_that_equals_everything(data):
    """Its objects are passed back by the tests, and still prove nothing."""
    (p,) = load("mbpp", data, allow_code=True).problems("train")
    pair = "class Pair:\n    def __init__(self, *a): pass\n    def __eq__(self, other): return True\n"
    forged = f"{pair}def chain(arr, n): return arr[0]"
    assert verify(p, forged).status == "wrong"


@pytest.mark.parametrize(
    "piece", ["a", " ", "\n", "```\n", "def largest", "<think>", "[BEGIN]", "[DONE]", "largest : ", "é"]
)
def test_long_texts_take_little_time(problem, piece):
    text = piece * (10**6 // len(piece))
    for given in (text, text[:60000]):
        assert quickest(final, problem, given) < 0.1


@pytest.mark.skipif("MINIR1_MBPP" not in os.environ, reason="set MINIR1_MBPP to mbpp.jsonl as published")
def test_published_programs():
    task = load("mbpp", os.environ["MINIR1_MBPP"], allow_code=True)
    for split in task.splits:
        assert [p.extra["task_id"] for p in task.problems(split) if task.verify(p, p.reference).status != "right"] == []
