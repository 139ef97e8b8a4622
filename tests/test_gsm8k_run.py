"""R1-Zero on files of GSM8K from end to end: a toy model of Qwen2.5's shape, whole or with adapters, in bfloat16."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments import demo, evaluate, r1_zero
from minir1 import checkpoint
from minir1.data import pad_rows
from minir1.log import read_metrics
from minir1.model import hf
from minir1.model.config import dense
from minir1.model.lora import adapters
from minir1.model.transformer import Transformer
from minir1.templates import R1_ZERO
from minir1.tokenizer import EOS, TAGS, Tokenizer

ROOT = Path(__file__).parent.parent
PUBLISHED = Path(os.environ.get("MINIR1_GSM8K", ROOT / "data" / "gsm8k"))
QUESTION = "Tom has {} apples and gives all but {} away. How many are left"
TEXT = "<think>He keeps {}</think> <answer>{}</answer>"


def made_up(path: Path) -> Path:
    """Files in GSM8K's layout: 60 and 8 problems whose answers are 1 and 2."""
    for name, numbers in (("train", range(3, 63)), ("test", range(63, 71))):
        pairs = [(QUESTION.format(n, n % 2 + 1), f"He keeps some.\n#### {n % 2 + 1}") for n in numbers]
        lines = [{"question": question, "answer": answer} for question, answer in pairs]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module", params=["made up", "published"])
def data(request, tmp_path_factory):
    if request.param == "published" and not (PUBLISHED / "train.jsonl").is_file():
        pytest.skip("no published data: set MINIR1_GSM8K")
    return PUBLISHED if request.param == "published" else made_up(tmp_path_factory.mktemp("data"))


def byte_level(texts: list[str]) -> Tokenizer:
    """Byte-level BPE as a base model has it: an end token, and none for the tags."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, eos=EOS, pad=EOS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Qwen2ForCausalLM of 50,000 parameters that has seen what an answer looks like, and answers 1 or 2 at random."""
    texts = [TEXT.format(n, n) for n in (1, 2)]
    tokenizer = byte_level([R1_ZERO, QUESTION, *texts] * 9)
    assert all(tokenizer.backend.token_to_id(tag) is None for tag in TAGS)  # tags are text
    torch.manual_seed(0)
    shape = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "tied": True, "qkv_bias": True}
    model = Transformer(dense(vocab=512, eos=tokenizer.eos, pad=tokenizer.pad, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    asked = [tokenizer.encode(R1_ZERO.replace("{question}", QUESTION.format(n, n % 2 + 1))) for n in (5, 28, 36, 61)]
    rows = [(prompt, prompt + tokenizer.encode(text) + [tokenizer.eos]) for prompt in asked for text in texts]
    tokens, lengths = pad_rows([row for _, row in rows])
    mask = torch.arange(tokens.shape[1]) >= torch.tensor([[len(prompt)] for prompt, _ in rows])
    for _ in range(80):
        (-model.logprob(tokens, lengths=lengths, mask=mask).sum() / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("qwen")
    hf.save(model, tokenizer, path)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["tie_word_embeddings"]
    return path


LETHAL = """
import os, signal, sys
from experiments import r1_zero
from minir1 import cli
real, calls = r1_zero.clip_gradients, 0
def lethal(*args):
    global calls
    calls += 1
    if calls == 4:  # the second mini-batch of the second step, its gradient ready, not applied
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
r1_zero.clip_gradients = lethal
cli.run(r1_zero.main, r1_zero.Config)
"""


def plain(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}


def assert_equal(a, b) -> None:
    """Nested states are equal to the bit, but for the seconds."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        [assert_equal(a[key], b[key]) for key in a if key != "seconds"]
    elif isinstance(a, list):
        [assert_equal(x, y) for x, y in zip(a, b, strict=True)]
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_bits(base, data, tmp_path, rank):
    config = r1_zero.Config(
        checkpoint=base, task="gsm8k", data=str(data), template="r1_zero", dtype="bfloat16", lora_rank=rank,
        steps=3, prompts=4, num_generations=4, max_completion_length=24, learning_rate=1e-3, warmup=1, min_mixed=0.0,
        eval_every=1, eval_problems=4, eval_answers=1, out=tmp_path / "whole",
    )  # fmt: skip
    r1_zero.main(config)
    words = f"""--checkpoint {base} --task gsm8k --data {data} --template r1_zero --dtype bfloat16 --lora-rank {rank}
        --steps 3 --prompts 4 --num-generations 4 --max-completion-length 24 --learning-rate 1e-3 --warmup 1
        --min-mixed 0 --eval-every 1 --eval-problems 4 --eval-answers 1 --out {tmp_path / "run"}""".split()
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", LETHAL, *words], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.latest(tmp_path / "run" / "checkpoint").name == "step-000001"
    command = [sys.executable, "-m", "experiments.r1_zero", *words, "--resume"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    rows, others = ([plain(row) for row in read_metrics(tmp_path / name)] for name in ("whole", "run"))
    assert rows == others and [row["step"] for row in rows] == [0, 1, 2, 3]
    assert (tmp_path / "whole" / "samples.jsonl").read_bytes() == (tmp_path / "run" / "samples.jsonl").read_bytes()
    a, b = (checkpoint.latest(tmp_path / name / "checkpoint") for name in ("whole", "run"))
    name = "adapter_model.safetensors" if rank else "model.safetensors"
    assert (a / name).read_bytes() == (b / name).read_bytes()
    states = [checkpoint.load_state(path) for path in (a, b)]
    assert_equal(*states)
    assert all(master.dtype == torch.float32 for master in states[0]["optimizer"]["masters"])

    assert all(row["train/ratio_deviation"] < 0.02 for row in rows[1:])
    if data != PUBLISHED:  # there was something to learn from, or this would compare nothing with nothing
        assert any(row["train/mixed_groups"] > 0 and row["train/grad_norm"] > 0 for row in rows[1:])
        start, end = (dict(hf.load(path, dtype=torch.bfloat16)[0].named_parameters()) for path in (base, a))
        if rank:
            assert any(weight.any() for name, weight in end.items() if name.endswith(".B"))  # they begin at zero
        else:
            assert any(not torch.equal(start[name], weight) for name, weight in end.items())
    assert bool(adapters(hf.load(a)[0])) == bool(rank)


def test_the_result_is_evaluated_on_the_test_problems(base, data, capsys):
    settings = {"task": "gsm8k", "data": str(data), "template": "r1_zero", "dtype": "bfloat16", "problems": 4}
    config = evaluate.Config(checkpoint=base, **settings, num_generations=2, max_completion_length=24)
    values = evaluate.main(config)
    assert {"pass@1", "pass@2", "maj@2", "greedy", "forced", "format", "length", "tokens_per_s"} <= values.keys()
    shown = capsys.readouterr().out
    assert "gsm8k, test: 4 problems" in shown and "baseline" not in shown and "per answer" not in shown
    with pytest.raises(ValueError, match="task gsm8k has no split 'unseen'; it has train, validation, test"):
        evaluate.main(replace(config, split="unseen"))


def test_the_demonstration_of_a_task_without_behaviour_baselines_and_corpus(base, tmp_path):
    """It starts from a given checkpoint, tests on the one split that is left, and draws what there is."""
    shutil.copytree(base, tmp_path / "base" / "checkpoint")
    (tmp_path / "data").mkdir()
    rl = r1_zero.Config(
        template="r1_zero", steps=2, prompts=2, num_generations=2, max_completion_length=24, min_mixed=0.0,
        eval_every=2, eval_problems=2, eval_answers=1,
    )  # fmt: skip
    config = demo.Config(task="gsm8k", data=str(made_up(tmp_path / "data")), rl=rl, problems=4, num_generations=2)
    with pytest.raises(ValueError, match="task gsm8k has no corpus to pre-train on"):
        demo.main(replace(config, out=tmp_path / "run"))
    result = demo.main(replace(config, base_from=tmp_path / "base", out=tmp_path / "run"))
    assert {"before/pass@1", "after/pass@1", "gain/pass@1", "forced/pass@1", "seconds/rl"} <= result.keys()
    assert not any("search" in key or "_unseen" in key or key.startswith("skill/") for key in result)
    assert (tmp_path / "run" / "figures" / "r1_zero.png").stat().st_size > 10_000
