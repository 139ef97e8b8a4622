"""R1-Zero on files of GSM8K from end to end: a toy model of Qwen2.5's shape, whole or with adapters, in bfloat16."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from runs import ROOT, assert_same_run, command, kill
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


def taught(tokenizer: Tokenizer, prompts: list[str], texts: list[str], path: Path) -> Path:
    """A Qwen2ForCausalLM of 50,000 parameters that answers each prompt with one of the texts at random."""
    torch.manual_seed(0)
    shape = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "tied": True, "qkv_bias": True}
    model = Transformer(dense(vocab=512, eos=tokenizer.eos, pad=tokenizer.pad, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    asked = [tokenizer.encode(prompt) for prompt in prompts]
    rows = [(prompt, prompt + tokenizer.encode(text) + [tokenizer.eos]) for prompt in asked for text in texts]
    tokens, lengths = pad_rows([row for _, row in rows])
    mask = torch.arange(tokens.shape[1]) >= torch.tensor([[len(prompt)] for prompt, _ in rows])
    for _ in range(80):
        (-model.logprob(tokens, lengths=lengths, mask=mask).sum() / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    hf.save(model, tokenizer, path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model trained on well-formed answers, which answers 1 or 2 at random."""
    texts = [TEXT.format(n, n) for n in (1, 2)]
    tokenizer = byte_level([R1_ZERO, QUESTION, *texts] * 9)
    assert all(tokenizer.backend.token_to_id(tag) is None for tag in TAGS)  # tags are text
    prompts = [R1_ZERO.replace("{question}", QUESTION.format(n, n % 2 + 1)) for n in (5, 28, 36, 61)]
    path = taught(tokenizer, prompts, texts, tmp_path_factory.mktemp("qwen"))
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["tie_word_embeddings"]
    return path


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_killed_run_resumes_to_the_same_bits(base, data, tmp_path, rank):
    config = r1_zero.Config(
        checkpoint=base, task="gsm8k", data=str(data), template="r1_zero", dtype="bfloat16", lora_rank=rank,
        steps=3, prompts=4, num_generations=4, max_completion_length=24, learning_rate=1e-3, warmup=1, min_mixed=0.0,
        eval_every=1, eval_problems=4, eval_answers=1, out=tmp_path / "whole",
    )  # fmt: skip
    r1_zero.main(config)
    killed = replace(config, out=tmp_path / "run")
    # The second mini-batch of the second step: its gradient is computed, not applied.
    kill("r1_zero", killed, "experiments.r1_zero", "clip_gradients", 4, tmp_path / "config")
    assert checkpoint.latest(tmp_path / "run" / "checkpoint").name == "step-000001"
    words = f"""--checkpoint {base} --task gsm8k --data {data} --template r1_zero --dtype bfloat16 --lora-rank {rank}
        --steps 3 --prompts 4 --num-generations 4 --max-completion-length 24 --learning-rate 1e-3 --warmup 1
        --min-mixed 0 --eval-every 1 --eval-problems 4 --eval-answers 1 --out {tmp_path / "run"} --resume""".split()
    done = command("-m", "experiments.r1_zero", *words)
    assert done.returncode == 0, done.stderr

    assert_same_run(tmp_path / "run", tmp_path / "whole")
    rows, path = read_metrics(tmp_path / "whole"), checkpoint.latest(tmp_path / "whole" / "checkpoint")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(master.dtype == torch.float32 for master in checkpoint.load_state(path)["optimizer"]["masters"])
    assert all(row["train/ratio_deviation"] < 0.02 for row in rows[1:])
    if data != PUBLISHED:  # the comparison would be empty if nothing had been learned
        assert any(row["train/mixed_groups"] > 0 and row["train/grad_norm"] > 0 for row in rows[1:])
        start, end = (dict(hf.load(p, dtype=torch.bfloat16)[0].named_parameters()) for p in (base, path))
        if rank:
            assert any(weight.any() for name, weight in end.items() if name.endswith(".B"))  # they begin at zero
        else:
            assert any(not torch.equal(start[name], weight) for name, weight in end.items())
    assert bool(adapters(hf.load(path)[0])) == bool(rank)


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
    """It starts from a given checkpoint, tests on the only remaining split, and plots what was measured."""
    (tmp_path / "data").mkdir()
    rl = r1_zero.Config(
        template="r1_zero", steps=2, prompts=2, num_generations=2, max_completion_length=24, min_mixed=0.0,
        eval_every=2, eval_problems=2, eval_answers=1,
    )  # fmt: skip
    config = demo.Config(task="gsm8k", data=str(made_up(tmp_path / "data")), rl=rl, problems=4, num_generations=2)
    with pytest.raises(ValueError, match="task gsm8k has no corpus to pre-train on"):
        demo.main(replace(config, out=tmp_path / "run"))
    result = demo.main(replace(config, base_from=base, out=tmp_path / "run"))
    assert {"before/pass@1", "after/pass@1", "gain/pass@1", "forced/pass@1", "seconds/rl"} <= result.keys()
    assert not any("search" in key or "_unseen" in key or key.startswith("skill/") for key in result)
    assert (tmp_path / "run" / "figures" / "r1_zero.png").stat().st_size > 10_000
