"""R1-Zero and an evaluation on files of MBPP and HumanEval: programs that the model writes run in the sandbox."""

import json

import pytest
from test_gsm8k_run import byte_level, taught

from experiments import evaluate, r1_zero
from minir1 import sandbox, tasks
from minir1.log import read_metrics

pytestmark = pytest.mark.skipif(not sandbox.best()[0], reason=sandbox.protection())
NAMES = ("plus", "minus", "times")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files in the published layouts; of `a op b` for three operators, times is only in HumanEval."""
    folder = tmp_path_factory.mktemp("code")
    tests = {"plus": "plus(4, 2) == 6", "minus": "minus(4, 2) == 2", "times": "times(4, 2) == 8"}
    mbpp = [
        {"task_id": i, "text": f"Write {name}.", "code": f"def {name}(a, b):\n    return a", "test_setup_code": "",
         "test_list": [f"assert {tests[name]}"], "challenge_test_list": []}
        for i, name in zip((601, 602, 511, 11), ("plus", "minus", "plus", "minus"))
    ]  # fmt: skip
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mbpp))
    line = {"task_id": "HumanEval/0", "prompt": "def times(a, b):\n", "entry_point": "times"}
    line |= {"canonical_solution": "    return a * b\n", "test": f"def check(times):\n    assert {tests['times']}\n"}
    (folder / "HumanEval.jsonl").write_text(json.dumps(line) + "\n")
    return f"humaneval={folder / 'HumanEval.jsonl'},mbpp={folder / 'mbpp.jsonl'}"


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A model that answers with the sum or with the difference."""
    task = tasks.load("humaneval+mbpp", data, allow_code=True)
    prompts = [problem.prompt for split in ("train", "validation") for problem in task.problems(split)]
    texts = [f"def {name}(a, b):\n    return a {sign} b\n" for name in ("plus", "minus") for sign in "+-"]
    return taught(byte_level(prompts + texts * 9), prompts, texts, tmp_path_factory.mktemp("coder"))


def test_programs_are_rewarded_by_their_tests(base, data, tmp_path, capsys):
    shared = {"task": "humaneval+mbpp", "data": data, "template": "plain", "dtype": "bfloat16"}
    config = r1_zero.Config(
        checkpoint=base, allow_code=True, **shared, lora_rank=4, recompute=True, steps=2, prompts=2, num_generations=8,
        max_completion_length=32, learning_rate=1e-2, warmup=1, min_mixed=0.0, eval_every=2, eval_answers=2,
        difficulty_window=(0.1, 0.9), out=tmp_path / "run",
    )  # fmt: skip
    r1_zero.main(config)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2] and "predicted memory" in capsys.readouterr().out
    assert all(row["train/unjudged"] == 0 for row in rows[1:])
    assert any(0 < row["train/accuracy"] < 1 and row["train/mixed_groups"] > 0 for row in rows[1:])
    values = evaluate.main(evaluate.Config(
        checkpoint=tmp_path / "run" / "checkpoint", allow_code=True, **shared, num_generations=2, forced=False,
        max_completion_length=32, out=tmp_path / "eval",
    ))  # fmt: skip
    assert values["unjudged"] == 0 and "pass@2" in values and "humaneval+mbpp, test: 2" in capsys.readouterr().out


def test_nothing_runs_without_permission(base, data, tmp_path):
    config = r1_zero.Config(checkpoint=base, task="humaneval+mbpp", data=data, template="plain", out=tmp_path / "run")
    with pytest.raises(ValueError, match="task humaneval runs programs that the model wrote.*--allow-code"):
        r1_zero.main(config)
    assert not (tmp_path / "run").exists()
