"""experiments/distill.py and distill_on_policy.py at toy size: gradients by hand, stored log-probs, resumed runs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from runs import assert_same_run, result_of, stop
from safetensors.torch import save_file
from test_preference_pairs import assert_bad_option, save_base
from test_sft import write_dialogues
from test_tokenizer import QWEN, pair

from experiments import distill, distill_on_policy, sft
from experiments.distill import Example
from minir1 import chat_data, checkpoint, policy
from minir1.distill import generalised_js, reverse_kl_advantage
from minir1.log import read_metrics
from minir1.model import hf
from minir1.model.config import dense
from minir1.model.lora import adapters
from minir1.model.moe import MoE
from minir1.model.transformer import Transformer
from minir1.rollout import collect


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    small = {"batch": 8, "epochs": 1, "warmup": 2, "learning_rate": 1e-2, "eval_every": 4, "microbatch": 200}
    small |= {"held_out": 0.2, "device": "cpu", "data": (write_dialogues(folder / "dialogues.jsonl"),)}
    teacher, student = save_base(folder / "teacher"), folder / "student"
    _, tokenizer = hf.load(teacher)
    torch.manual_seed(3)
    hf.save(Transformer(dense(vocab=hf.load(teacher)[0].config.vocab, dim=16, layers=1, heads=2, kv_heads=1, ffn=32,
                              eos=tokenizer.eos, pad=tokenizer.pad)), tokenizer, student)  # fmt: skip
    return distill.Config(student=student, teacher=teacher, out=folder / "run", **small)


def opened(config):
    """Student and teacher in fp64, and some examples."""
    student, tokenizer = hf.load(config.student, dtype=torch.float64)
    teacher = hf.load(config.teacher, dtype=torch.float64)[0].requires_grad_(False)
    documents = chat_data.load(config.data, tokenizer, 1024)[:9]
    return student, teacher, [Example(document, None) for document in documents]


@pytest.mark.parametrize("beta, temperature, ce_weight", [(0.0, 1.0, 0.0), (0.5, 2.0, 0.3), (1.0, 1.0, 0.5)])
def test_the_gradient_is_that_of_the_loss_written_out(config, beta, temperature, ce_weight):
    config = replace(config, beta=beta, temperature=temperature, ce_weight=ce_weight, microbatch=64)
    student, teacher, examples = opened(config)
    loss = distill.loss_backward(student, teacher, examples, config)
    have = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    total, parts = distill.trained_tokens(examples), []
    for document, _ in examples:
        tokens, trained = torch.tensor([document.tokens]), torch.tensor(document.trained)[1:]
        z_s, z_t = (model(tokens)[0, :-1][trained] for model in (student, teacher))
        ce = -z_s.log_softmax(-1).gather(1, tokens[0, 1:][trained][:, None])[:, 0]
        kl = generalised_js((z_s / temperature).log_softmax(-1), (z_t / temperature).log_softmax(-1), beta)
        parts.append((ce_weight * ce + (1 - ce_weight) * temperature**2 * kl).sum())
    want = sum(parts) / total
    want.backward()
    assert loss[0] == pytest.approx(want.item(), rel=1e-10) and loss[1] == []  # no layer has experts
    for a, p in zip(have, student.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("student", ["student", "teacher"])
def test_texts_alone_are_supervised_fine_tuning(config, tmp_path, student):
    """The same steps as sft.py, also of a model with experts: sequence-level distillation is nothing else."""
    alone = replace(config, teacher=None, student=getattr(config, student), out=tmp_path / "distill")
    result = distill.main(alone)
    names = ("data", "batch", "epochs", "warmup", "learning_rate", "eval_every", "microbatch", "held_out", "device")
    same = {name: getattr(alone, name) for name in names}
    theirs = sft.main(sft.Config(checkpoint=alone.student, out=tmp_path / "sft", **same))
    assert result["after/loss"] == pytest.approx(theirs["after/loss"], rel=1e-5)
    ours, others = (hf.load(checkpoint.latest(tmp_path / name / "checkpoint"))[0] for name in ("distill", "sft"))
    biases = [[m.bias for m in model.modules() if isinstance(m, MoE)] for model in (ours, others)]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*biases)) and bool(biases[0]) == (student == "teacher")
    assert "after/divergence" not in result


def test_a_student_comes_closer_to_its_teacher(config):
    result = distill.main(replace(config, epochs=6))
    assert result["after/divergence"] < 0.8 * result["before/divergence"]
    assert (config.out / "figures" / "distill.png").exists()
    assert result_of(config.out)["tokens"] > 0


@pytest.mark.parametrize("changes", [{}, {"top_k": 4}, {"ce_weight": 0.5, "lora_rank": 2}])
def test_a_killed_run_continues_to_the_same_end(config, tmp_path, monkeypatch, changes):
    config = replace(config, **changes)
    whole = replace(config, out=tmp_path / "whole")
    distill.main(whole)
    part = replace(config, out=tmp_path / "part")
    stop(monkeypatch, "distill", part, "experiments.distill", "clip_gradients", 6)
    distill.main(replace(part, resume=True))
    assert_same_run(whole.out, part.out)


def test_stored_log_probs_of_all_but_one_token_are_the_teacher(config, tmp_path):
    """With k = V - 1 the rest is a token of its own, and the losses are the same."""
    V = hf.load(config.teacher)[0].config.vocab
    beside, before = (
        distill.main(replace(config, out=tmp_path / str(k), top_k=k)) for k in (None, V - 1)
    )
    assert before == pytest.approx(beside, rel=1e-4)
    stored = tmp_path / "file.safetensors"
    few = replace(config, top_k=3, stored=stored)
    first = distill.main(replace(few, out=tmp_path / "a"))
    changed = stored.stat().st_mtime_ns
    assert distill.main(replace(few, out=tmp_path / "b")) == first and stored.stat().st_mtime_ns == changed
    for name, value in {"k": {"top_k": 4}, "temperature": {"temperature": 2.0}, "texts": {"held_out": 0.3}}.items():
        with pytest.raises(ValueError, match=f"with another {name}"):
            distill.main(replace(few, out=tmp_path / f"other-{name}", **value))
    teacher = Path(shutil.copytree(config.teacher, tmp_path / "teacher"))
    few = replace(few, teacher=teacher)
    assert distill.main(replace(few, out=tmp_path / "moved")) == first  # the same weights elsewhere
    model, tokenizer = hf.load(teacher)
    with torch.no_grad():
        model.head.weight[0] += 1
    hf.save(model, tokenizer, teacher)
    with pytest.raises(ValueError, match="with another teacher"):
        distill.main(replace(few, out=tmp_path / "trained"))


def test_a_refused_store_leaves_nothing_behind(config, tmp_path):
    """So that the corrected command can start."""
    stored, out = tmp_path / "stored.safetensors", tmp_path / "run"
    run = replace(config, top_k=3, stored=stored, out=out)
    with pytest.raises(ValueError, match="k = 100000: from 1 to "):
        distill.main(replace(run, top_k=100_000))
    assert not list(tmp_path.iterdir())
    stored.write_bytes(b"junk")
    with pytest.raises(ValueError, match="is no file of stored log-probs"):
        distill.main(run)
    assert not out.exists()
    stored.unlink()
    distill.main(run)


def test_a_store_says_the_dtype_that_its_teacher_had(config, tmp_path):
    """Not the option, whose None is another dtype on another device."""
    _, _, examples = opened(config)
    documents = [example.document for example in examples]
    ask = lambda **changes: distill.about(documents, 9, replace(config, **changes))["dtype"]
    assert ask() == ask(dtype="float32") == ask(dtype="bfloat16", teacher_dtype="float32") == "torch.float32"
    assert ask(dtype="bfloat16") == ask(teacher_dtype="bfloat16") == "torch.bfloat16"


def test_a_file_of_something_else_is_no_store(config, tmp_path):
    for name, content in (("junk", b"junk"), ("other", None)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content) if content else save_file({"x": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="is no file of stored log-probs"):
            distill.main(replace(config, top_k=3, stored=path, out=tmp_path / name))


def test_top_k_of_a_smaller_vocabulary_is_refused(config, tmp_path):
    teacher, tokenizer = hf.load(config.teacher)
    shape = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "eos": tokenizer.eos, "pad": tokenizer.pad}
    hf.save(Transformer(dense(vocab=tokenizer.size, **shape)), tokenizer, tmp_path / "teacher")
    hf.save(Transformer(dense(vocab=tokenizer.size + 8, **shape)), tokenizer, tmp_path / "student")
    run = replace(config, teacher=tmp_path / "teacher", student=tmp_path / "student", top_k=3, out=tmp_path / "run")
    with pytest.raises(ValueError, match="the teacher's vocabulary of .* is smaller"):
        distill.main(run)


def test_another_tokenizer_is_refused_with_a_way_out(config, tmp_path):
    teacher = tmp_path / "teacher"
    tokenizer = pair(QWEN)[0]
    hf.save(Transformer(dense(vocab=tokenizer.size, dim=16, layers=1, heads=2, kv_heads=1, ffn=32,
                              eos=tokenizer.eos, pad=tokenizer.pad)), tokenizer, teacher)  # fmt: skip
    with pytest.raises(ValueError, match="the teacher's tokens are not the student's .* reject_sample.py"):
        distill.main(replace(config, teacher=teacher, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option, message", [
    ("--ce-weight 1", "the teacher has no part"), ("--beta 1.5", "beta = 1.5"), ("--temperature 0", "temperature"),
    ("--top-k 0", "top_k"), ("--stored file", "Give --top-k"), ("--top-k 2 --stored .", "stored = .: name a file"),
])  # fmt: skip
def test_bad_options(option, message, capsys):
    assert_bad_option(distill, f"--teacher t {option}", message, capsys)


@pytest.mark.parametrize("option", ["--beta 0.5", "--temperature 2", "--top-k 3", "--teacher-dtype bfloat16"])
def test_options_of_a_teacher_need_one(option, capsys):
    assert_bad_option(distill, option, "of which --teacher?", capsys)


def test_a_granite_student_opens_in_transformers_and_continues_as_ours(config, tmp_path):
    """Random weights in Granite's architecture, with its four scales, and the teacher's vocabulary."""
    teacher, tokenizer = hf.load(config.teacher)
    granite = dense(vocab=teacher.config.vocab, dim=32, layers=2, heads=4, kv_heads=2, ffn=64, qkv_bias=False,
                    embedding_scale=12.0, residual_scale=0.22, attention_scale=0.125, logit_scale=1 / 8, tied=True,
                    eos=tokenizer.eos, pad=tokenizer.pad)  # fmt: skip
    torch.manual_seed(0)
    hf.save(Transformer(granite), tokenizer, tmp_path / "granite")
    run = replace(config, student=tmp_path / "granite", out=tmp_path / "run", epochs=2)
    result = distill.main(run)
    assert result["after/divergence"] < result["before/divergence"]
    folder = checkpoint.latest(run.out / "checkpoint")
    ours, _ = hf.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "GraniteForCausalLM"
    tokens = torch.tensor([tokenizer.encode("User:make 3 from 1,2\nAssistant:")])
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)


# ---- on policy ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_policy(config):
    small = {"steps": 4, "prompts": 4, "num_generations": 2, "max_completion_length": 12, "eval_every": 2, "warmup": 1}
    small |= {"eval_problems": 4, "eval_answers": 1, "learning_rate": 1e-2, "device": "cpu", "microbatch": 100}
    return distill_on_policy.Config(student=config.student, teacher=config.teacher, out=config.out / "on", **small)


@pytest.mark.parametrize("changes", [{}, {"beta": 0.5}, {"beta": 1.0, "reward_weight": 0.5}, {"lora_rank": 2}])
def test_a_killed_run_on_policy_continues_to_the_same_end(on_policy, tmp_path, monkeypatch, changes):
    whole = replace(on_policy, out=tmp_path / "whole", **changes)
    distill_on_policy.main(whole)
    part = replace(whole, out=tmp_path / "part")
    stop(monkeypatch, "distill_on_policy", part, "experiments.distill_on_policy", "clip_gradients", 6)
    distill_on_policy.main(replace(part, resume=True))
    assert_same_run(whole.out, part.out)
    assert bool(adapters(hf.load(checkpoint.latest(whole.out / "checkpoint"))[0])) == bool(changes.get("lora_rank"))


def test_a_training_prompt_that_cannot_be_encoded_is_refused_before_the_first_step(on_policy, tmp_path):
    odd = str(Path(__file__).parent / "odd_prompt_task.py")
    with pytest.raises(ValueError, match="no token for 'é' in the prompt"):
        distill_on_policy.main(replace(on_policy, task=odd, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_student_comes_closer_on_its_own_samples(on_policy, tmp_path):
    for name, beta in (("sampled", None), ("exact", 1.0)):
        config = replace(on_policy, out=tmp_path / name, beta=beta, steps=25, prompts=16, eval_every=25)
        distill_on_policy.main(config)
        key = "train/divergence" if beta else "train/reverse_kl"
        kl = [row[key] for row in read_metrics(config.out) if key in row]
        assert sum(kl[-5:]) < 0.8 * sum(kl[:5]), name


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_both_estimates_have_the_same_mean(on_policy, temperature):
    """Sampled gradients over many answers approach the exact one of KL(S‖T) on the same prefixes."""
    student, _ = hf.load(on_policy.student)
    teacher = hf.load(on_policy.teacher)[0].requires_grad_(False)
    config = replace(on_policy, num_minibatches=1, grad_clip=1e9, microbatch=10**6, temperature=temperature)
    class Keep:  # an optimizer that keeps the gradient
        def step(self):
            self.slope = torch.cat([p.grad.flatten().clone() for p in student.parameters() if p.grad is not None])

        def zero_grad(self, set_to_none):
            student.zero_grad()

    rollout = collect(student, [[1, 2, 3]], answers=40_000, max_tokens=2, stop=[0], seed=1, temperature=temperature)
    advantage = reverse_kl_advantage(rollout.logp, policy.logprobs(teacher, rollout, 10**6))
    keep, slopes = Keep(), []
    for settings in (config, replace(config, beta=1.0)):
        distill_on_policy.learn(student, teacher, keep, rollout, advantage, settings, 1)
        slopes.append(keep.slope)
    sampled, exact = slopes
    assert (sampled - exact).norm() < 0.1 * exact.norm()
    assert torch.nn.functional.cosine_similarity(sampled, exact, 0) > 0.995


@pytest.mark.parametrize("option, message", [
    ("--reward-weight 1 --num-generations 1", "needs a group"), ("--beta 2", "beta = 2"),
    ("--beta 1 --epsilon-low 0.1", "nothing is clipped"),
])  # fmt: skip
def test_bad_options_on_policy(option, message, capsys):
    assert_bad_option(distill_on_policy, option, message, capsys)
