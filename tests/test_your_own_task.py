"""docs/your_own_task.md as it stands: its file, its commands, and what it says came of them."""

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from minir1 import tasks

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your_own_task.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
(CODE,) = (text for kind, text in BLOCKS if kind == "python")
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
(DOCTOR,) = re.findall(r"`(python -m experiments\.doctor [^`]+)`", PAGE)


def test_forty_lines_in_all():
    lines = [line for line in CODE.splitlines() if line.strip()] + COMMANDS
    assert len(COMMANDS) == 3 and len(lines) <= 40


def test_the_task_says_what_the_page_says(tmp_path):
    (tmp_path / "largest.py").write_text(CODE, encoding="utf-8")
    task = tasks.load(tmp_path / "largest.py")
    splits = {name: task.problems(name) for name in task.splits}
    asked = {name: {problem.prompt for problem in problems} for name, problems in splits.items()}
    assert list(asked) == ["train", "validation", "test"] and not asked["train"] & (asked["validation"] | asked["test"])
    problem = splits["train"][0]
    right = f"<think>1</think><answer>{problem.reference}</answer>"
    assert task.verify(problem, right).status == "right" and task.verify(problem, problem.reference).status == "wrong"
    texts = list(islice(task.documents(0), 500))
    assert all(re.search(r"User:(.*)\n", text)[1] in asked["train"] for text in texts)
    assert 0.1 < sum(text.count(",") == 8 for text in texts) / 500 < 0.3  # one in five reads along


@pytest.mark.first
def test_its_commands_teach_the_model_to_read_along(tmp_path):
    (tmp_path / "largest.py").write_text(CODE, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in [*COMMANDS, DOCTOR]:
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "none of the known failures" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "runs/largest-rl/metrics.jsonl").read_text("utf-8").splitlines()]
    result = json.loads((tmp_path / "runs/largest-test/result.json").read_text(encoding="utf-8"))
    assert rows[0]["eval/pass@1"] < 0.35 and result["pass@1"] > 0.67
    assert rows[-1]["eval/length"] > 1.3 * rows[0]["eval/length"]
    assert result["forced"] < 0.35
