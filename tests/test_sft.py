"""experiments/sft.py at toy size: its gradient written out, packing, its run folder, resumed runs, published models."""

import copy
import json
import math
from dataclasses import replace

import pytest
import standin
import torch
import transformers
from runs import assert_resumes_by_itself, assert_same_run, plain_metrics, result_of, stop
from test_preference_pairs import assert_bad_option, save_base
from test_tokenizer import QWEN, R1, pair

from experiments import sft, sft_figure
from minir1 import chat_data, checkpoint
from minir1.chat_data import laid_out
from minir1.log import read_metrics
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.lora import adapters, adapters_off
from minir1.model.moe import MoE
from minir1.model.transformer import Transformer

standin.register()  # before the first backward pass of the process


def write_dialogues(path, prompts: int = 40):
    """Dialogues of one or two turns and several lengths; each prompt has two answers."""
    lines = []
    for i in range(prompts):
        question = f"make {i} from 1,2"
        for answer in ("1+2", "1*2"):
            said = "<think>" + "1+1=2:3 no\n" * (i % 3) + f"</think><answer>{answer}</answer>"
            turns = [question, said, "make 3 from 1,2", "<answer>1+2</answer>"][: 2 + 2 * (i % 5 == 0)]
            roles = ("user", "assistant") * 2
            lines.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, turns)]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    small = {"batch": 8, "epochs": 1, "warmup": 2, "learning_rate": 1e-2, "eval_every": 4, "microbatch": 200}
    small |= {"held_out": 0.2, "balance_speed": 0.01, "device": "cpu"}
    data = write_dialogues(folder / "dialogues.jsonl")
    return sft.Config(checkpoint=save_base(folder / "base"), data=(data,), out=folder / "run", **small)


@pytest.fixture(scope="module")
def start(config):
    """The policy, in fp64, and fourteen documents."""
    model, tokenizer = hf.load(config.checkpoint, dtype=torch.float64)
    return model, chat_data.load(config.data, tokenizer, 1024)[:14]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, documents, microbatch):
    model = copy.deepcopy(model)
    loss, loads = sft.loss_backward(model, documents, microbatch)
    return loss, loads, gradients(model)


def assert_same(one, other):
    assert one.keys() == other.keys() and any(g.abs().max() > 0 for g in one.values())
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-8)  # the router works in fp32


# ---- the loss ----------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_answer_tokens_written_out(start):
    """From the logits of each document alone: -1/N Σ log softmax(z_{t-1})[x_t], with one N for the batch."""
    model, documents = copy.deepcopy(start[0]), start[1]
    terms = []
    for document in documents:
        logp = model(torch.tensor([document.tokens]))[0].log_softmax(-1)
        terms += [-logp[t - 1, x] for t, (x, trained) in enumerate(zip(document.tokens, document.trained)) if trained]
    assert 0 < len(terms) < sum(len(document.tokens) for document in documents)
    loss = torch.stack(terms).mean()
    loss.backward()
    have, _, grads = step(*start, 10**6)
    assert have == pytest.approx(loss.item(), rel=1e-6)
    assert_same(grads, gradients(model))


def test_no_result_depends_on_the_microbatch(start):
    loss, loads, whole = step(*start, 10**6)
    for microbatch in (1, 90, 300):
        have, parts, grads = step(*start, microbatch)
        assert have == pytest.approx(loss, rel=1e-9)
        assert_same(grads, whole)
        assert all(torch.equal(a, b) for a, b in zip(parts, loads, strict=True))
    tokens = sum(len(document.tokens) for document in start[1])
    assert len(loads) == 1 and int(loads[0].sum()) == tokens * start[0].config.experts_per_token


def test_what_is_not_trained_has_no_part_in_the_loss(start):
    """Any tokens after the last trained one: neither loss nor gradient depends on them."""
    model, documents = start
    half = [d._replace(trained=[t and i < len(d.tokens) // 2 for i, t in enumerate(d.trained)]) for d in documents]
    changed = [d._replace(tokens=d.tokens[: len(d.tokens) // 2] + d.tokens[len(d.tokens) // 2 :][::-1]) for d in half]
    used = [i for i, d in enumerate(half) if any(d.trained)]
    assert len(used) > 5
    pairs = [step(model, [rows[i] for i in used], 10**6) for rows in (half, changed)]
    assert pairs[0][0] == pytest.approx(pairs[1][0], rel=1e-9)
    assert_same(pairs[0][2], pairs[1][2])


def test_packed_documents_do_not_see_one_another(start):
    """Another first document, of the same or another length, changes no state and no log-prob of the second."""
    model, (first, second, *_) = start
    others = [first, first._replace(tokens=first.tokens[::-1]), start[1][7], start[1][3]]
    assert len({len(other.tokens) for other in others}) > 1
    alone = model.logprob(torch.tensor([second.tokens]))[0]
    state = model.hidden(torch.tensor([second.tokens]))[0]
    for other in others:
        tokens, cu_seqlens, _ = laid_out([other, second])
        n = len(other.tokens)
        torch.testing.assert_close(model.hidden(tokens, cu_seqlens=cu_seqlens)[n:], state, rtol=1e-9, atol=1e-11)
        logp = model.logprob(tokens, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(logp[n:], alone, rtol=1e-9, atol=1e-9)
        assert logp[0] == logp[n] == 0


# ---- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(config):
    sft.main(config)
    return config.out


def test_a_run_is_a_folder_with_losses_and_a_figure(whole, config):
    first, *rows = read_metrics(whole)
    _, tokenizer = hf.load(config.checkpoint)
    train, held_out = chat_data.split(chat_data.load(config.data, tokenizer, 1024), 0.2)
    assert first["step"] == 0 and first["eval/loss"] > 3 and len(held_out) > 4
    end = math.ceil(len(train) / 8)
    assert [row["step"] for row in rows] == list(range(1, end + 1))
    assert [row["step"] for row in rows if "eval/loss" in row] == [*range(4, end, 4), end]
    assert {"train/loss", "train/lr", "train/grad_norm", "train/max_violation", "perf/train_tok_s"} <= rows[0].keys()
    assert rows[0]["train/lr"] == 5e-3 and rows[-1]["train/lr"] == pytest.approx(1e-3)
    result = result_of(whole)
    assert result["before/loss"] == first["eval/loss"] and result["after/loss"] == rows[-1]["eval/loss"] < 3.5
    assert (result["examples"], result["examples/held_out"]) == (len(train), len(held_out))
    assert result["tokens"] >= sum(len(document.tokens) for document in train) and result["seconds/sft"] > 0
    assert (whole / "figures" / "sft.png").stat().st_size > 10_000


def test_the_held_out_loss_is_that_of_the_saved_model_and_moves_no_gradient(whole, config):
    model, tokenizer = hf.load(checkpoint.latest(whole / "checkpoint"))
    documents = chat_data.split(chat_data.load(config.data, tokenizer, 1024), 0.2)[1]
    expected = read_metrics(whole)[-1]["eval/loss"]
    for microbatch in (1, 10**6):
        assert sft.measure(model, documents, microbatch)["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in model.parameters()) and sft.measure(model, [], 100) == {}


def test_the_selection_bias_moves_once_a_step(whole, config, tmp_path):
    end = read_metrics(whole)[-1]["step"]
    (layer,) = (m for m in hf.load(checkpoint.latest(whole / "checkpoint"))[0].modules() if isinstance(m, MoE))
    counts = layer.bias / 0.01
    torch.testing.assert_close(counts, counts.round(), atol=1e-3, rtol=0)
    assert 0 < counts.abs().max() <= end + 1e-3
    sft.main(replace(config, steps=2, balance_speed=0.0, out=tmp_path))
    (layer,) = (m for m in hf.load(checkpoint.latest(tmp_path / "checkpoint"))[0].modules() if isinstance(m, MoE))
    assert not layer.bias.any()


def test_a_run_does_not_depend_on_the_microbatch_but_for_rounding(whole, config, tmp_path):
    sft.main(replace(config, microbatch=10**5, steps=3, recompute=True, out=tmp_path / "large"))
    sft.main(replace(config, microbatch=1, steps=3, out=tmp_path / "small"))
    for a, b in zip(*(plain_metrics(tmp_path / name) for name in ("large", "small")), strict=True):
        assert a == pytest.approx(b, rel=2e-3)


@pytest.mark.parametrize("count", [3, 6])
def test_a_stopped_run_resumes_to_the_same_bits(whole, config, tmp_path, monkeypatch, count):
    again = replace(config, out=tmp_path / "run")
    stop(monkeypatch, "sft", again, "experiments.sft", "clip_gradients", count)
    sft.main(replace(again, resume=True))
    assert_same_run(again.out, whole)


def test_a_run_resumes_without_its_base_but_not_from_a_changed_file(whole, config, tmp_path):
    assert_resumes_by_itself(sft.main, config, whole, tmp_path)


def test_a_run_of_other_steps_or_settings_is_not_resumed(whole, config):
    with pytest.raises(ValueError, match="steps = 99: the learning rate follows it"):
        sft.main(replace(config, resume=True, steps=99))
    with pytest.raises(ValueError, match="epochs: 1 then, 2 now"):
        sft.main(replace(config, resume=True, epochs=2))


def test_without_held_out_documents_all_are_trained(config, tmp_path):
    assert sft.main(replace(config, held_out=0.0, steps=1, out=tmp_path)) == {}
    assert result_of(tmp_path)["examples"] == 80 and "before/loss" not in result_of(tmp_path)
    assert all("eval/loss" not in row for row in read_metrics(tmp_path))


def test_long_documents_are_left_out_and_counted(config, tmp_path, capsys):
    sft.main(replace(config, max_length=40, steps=1, out=tmp_path))
    out = capsys.readouterr().out
    assert "documents of more than 40 tokens" in out and result_of(tmp_path)["examples"] < 60


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_run_on_another_device_is_that_of_the_cpu(config, tmp_path, rank):
    for device in ("cpu", "standin"):
        more = {"steps": 2, "eval_every": 1, "lora_rank": rank, "balance_speed": None, "device": device}
        sft.main(replace(config, **more, out=tmp_path / device))
    assert plain_metrics(tmp_path / "cpu") == plain_metrics(tmp_path / "standin")


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_weights_of_16_bits_are_trained_over_masters_and_resumed_to_the_same_bits(config, tmp_path, monkeypatch, rank):
    short = replace(config, dtype="bfloat16", steps=3, eval_every=2, lora_rank=rank, balance_speed=None, recompute=True)
    sft.main(replace(short, out=tmp_path / "whole"))
    again = replace(short, out=tmp_path / "run")
    stop(monkeypatch, "sft", again, "experiments.sft", "clip_gradients", 3)
    sft.main(replace(again, resume=True))
    assert_same_run(again.out, tmp_path / "whole")
    state = checkpoint.load_state(checkpoint.latest(again.out / "checkpoint"))
    assert {m.dtype for m in state["optimizer"]["masters"]} == {torch.float32}


def test_adapters_alone_are_trained_and_saved(config, tmp_path):
    result = sft.main(replace(config, lora_rank=4, balance_speed=None, steps=4, out=tmp_path))
    folder = checkpoint.latest(tmp_path / "checkpoint")
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    assert result["after/loss"] < result["before/loss"]
    model, tokenizer = hf.load(folder)
    base, _ = hf.load(config.checkpoint)
    documents = chat_data.split(chat_data.load(config.data, tokenizer, 1024), 0.2)[1]
    assert sft.measure(model, documents, 10**4)["eval/loss"] == pytest.approx(result["after/loss"], rel=1e-5)
    with adapters_off(model):
        assert sft.measure(model, documents, 10**4) == sft.measure(base, documents, 10**4)
    assert adapters(model) and all(torch.equal(a, b) for a, b in zip(base.buffers(), model.buffers()))


def test_a_bias_that_cannot_be_saved_does_not_move(config, tmp_path):
    for changes in ({"lora_rank": 4}, {"checkpoint": published(tmp_path / "dense", QWEN)}):
        with pytest.raises(ValueError, match="balance_speed = 0.01: 0 for a model without a selection bias, and with"):
            sft.main(replace(config, **changes, out=tmp_path / "run"))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--batch 0", "batch = 0: at least 1"),
        ("--epochs 0", "epochs = 0: at least 1"),
        ("--steps 0", "steps = 0: at least 1"),
        ("--held-out 1.5", "held_out = 1.5: 0 to 1"),
        ("--learning-rate -1", "learning_rate = -1.0: at least 0"),
        ("--template r1", "chat"),
        ("--data none.jsonl --checkpoint none", "none is no folder"),
    ],
)
def test_bad_options_are_named(line, message, capsys):
    assert_bad_option(sft, line, message, capsys)


def test_the_figure_without_held_out_losses_and_without_steps(tmp_path):
    for rows in ([], [{"step": 1, "train/loss": 2.0}], [{"step": 0, "eval/loss": 3.0}, {"step": 1, "train/loss": 2.0}]):
        sft_figure.draw_loss(rows, tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 5_000


# ---- published architectures -------------------------------------------------------------------

SHAPES = {  # with random weights, and a chat template of the same maker
    "qwen2": (dense(dim=32, layers=2, heads=2, kv_heads=1, ffn=64), QWEN),
    "deepseek-v3": (
        ModelConfig(dim=32, layers=2, heads=2, kv_lora=16, nope=8, rope=8, v_dim=8, ffn=64, experts=8, groups=4,
                    groups_kept=2, expert_ffn=16, dense_layers=1), R1,
    ),
}  # fmt: skip


def published(path, template, shape=SHAPES["qwen2"][0]):
    """A Hugging Face folder of this shape with random weights."""
    torch.manual_seed(0)
    tokenizer, _ = pair(template)
    hf.save(Transformer(replace(shape, vocab=tokenizer.size, eos=tokenizer.eos, pad=tokenizer.pad)), tokenizer, path)
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_architecture_is_trained_by_its_template_and_opens_in_transformers(name, tmp_path):
    shape, template = SHAPES[name]
    lines = []
    for i in range(12):
        said = (f"what is 1+{i}?", f"<think>{i}</think>it is {i}", "sure?", "<think>hm</think>yes")
        lines.append({"messages": [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 2, said)]})
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = published(tmp_path / "base", template, shape)
    small = {"epochs": 4, "batch": 6, "learning_rate": 1e-2, "warmup": 2, "held_out": 0.1, "device": "cpu"}
    result = sft.main(sft.Config(checkpoint=base, data=(data,), out=tmp_path / "run", **small))
    assert result["after/loss"] < result["before/loss"] - 0.5
    folder = checkpoint.latest(tmp_path / "run" / "checkpoint")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    _, tokenizer = hf.load(folder)
    documents = chat_data.split(chat_data.load([data], tokenizer, 1024), 0.1)[1]
    assert len(documents) == result_of(tmp_path / "run")["examples/held_out"]
    loss = count = 0.0  # by the labels of transformers: -100 is not trained
    with torch.no_grad():
        for d in documents:
            labels = torch.tensor([[t if trained else -100 for t, trained in zip(*d[:2])]])
            loss += theirs(torch.tensor([d.tokens]), labels=labels).loss.item() * sum(d.trained)
            count += sum(d.trained)
    assert loss / count == pytest.approx(result["after/loss"], rel=1e-4)
