"""Benchmarks of the model and of sampling at toy size: prefill, speculation, a step's profile, growth, peers."""

import json
from dataclasses import replace

import pytest
import torch
from toys import BASE, DENSE, MOE

from experiments import pretrain
from experiments.benchmarks import bench_speculative, floor, growth, peers, prefill, profile_step, serving
from minir1.log import read_metrics
from minir1.model import count, hf
from minir1.model.transformer import Transformer, on_meta
from minir1.tokenizer import word_level


def test_prefill_benchmark_at_toy_size(tmp_path):
    config = prefill.Config(lengths=(300,), chunk=128, whole=0, out=tmp_path / "found.json")
    figures = prefill.main(config)
    assert json.loads((tmp_path / "found.json").read_text()) == figures and "one_call/300/seconds" not in figures
    assert figures["cache/300/gib"] == 4 * 300 * 80 * 4 / 2**30  # layers · tokens · (64 + 16) · 4 bytes
    seconds, cpu, peak, cache = prefill.measure(300, None, replace(config, threads=torch.get_num_threads()))
    assert seconds > 0 and cpu > 0 and 0.1 < peak < 20 and cache == figures["cache/300/gib"]


def test_speculation_is_measured_on_a_base_that_is_made_once(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speculative.json"
    config = bench_speculative.Config(
        depths=(1,),
        pretrain=replace(BASE, steps=2, batch=512, device="cpu"),
        base=tmp_path,
        rows=(2,),
        problems=4,
        temperatures=(1.0,),
        max_completion_length=8,
        repeats=1,
        out=out,
    )
    threads = torch.get_num_threads()
    try:
        figures = bench_speculative.main(config)
    finally:
        torch.set_num_threads(threads)  # it measures on one
    assert json.loads(out.read_text()) == figures
    assert 0 <= figures["D=1/rows=2/T=1/accepted_1"] <= 1 <= figures["D=1/rows=2/T=1/tokens_a_pass"] <= 2
    assert all(figures[f"D=1/rows=2/T=1/{way}_tok_s"] > 0 for way in ("generate", "speculate"))
    metrics = read_metrics(tmp_path / "depth-1")
    assert len(metrics) == 2 and all(row["train/mtp_loss"] > 0 for row in metrics)
    monkeypatch.setattr(pretrain, "main", None)  # the base is there
    assert bench_speculative.trained(config, depth=1)[0].config.mtp_depth == 1
    assert "speculation after 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("dense", [False, True])
def test_the_profile_of_a_step(tmp_path, dense, capsys):
    sizes = {"prompts": 2, "num_generations": 2, "max_completion_length": 4, "pretrain_tokens": 160, "repeats": 1}
    sizes |= {"decode_rows": (1, 3), "decode_steps": 2}
    out = tmp_path / "new" / "p.json"
    figures = profile_step.main(profile_step.Config(dense=dense, **sizes, device="cpu", out=out))
    assert json.loads(out.read_text()) == figures
    for name, tokens in (("rollout", 16), ("reference", 16), ("update", 16), ("pretrain", 160), ("decode 3", 3)):
        assert figures[f"{name}/tok_s"] * figures[f"{name}/seconds"] == pytest.approx(tokens)
        assert 0 < figures[f"{name}/floor"] < 10 * figures[f"{name}/seconds"]  # other work makes either slower
    for name in ("rollout", "update"):
        shares = [value for key, value in figures.items() if key.startswith(f"{name}/") and "::" in key]
        assert shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1
    assert "time of the update by operator" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [MOE, DENSE, replace(MOE, tied=True, mtp_depth=1)])
def test_the_products_of_the_floor_are_those_that_count_counts(shape):
    """In 8 rows each expert has the same number of tokens."""
    model, flops = on_meta(shape), lambda products: sum(product.flops for product in products)
    steps = floor.matrices(model, 8, 8) + floor.attention(model, 8, 1, 40, 1, latent=True)
    assert flops(steps) == pytest.approx(8 * count.decode_flops(model, 40))
    texts = floor.forward(model, 8, 20, 160)
    assert flops(texts) == pytest.approx(160 * count.forward_flops(model, 10.5))
    assert flops(texts + floor.backward(texts)) == pytest.approx(160 * count.train_flops(model, 20))
    head = 2 * shape.dim * shape.vocab
    assert flops(texts) - flops(floor.forward(model, 8, 20, 100)) == pytest.approx(60 * head)


def test_few_rows_read_few_experts(monkeypatch):
    """One row reads 2 of 4 experts, two rows or more all four; the embedding is not read, a tied one as the head."""
    monkeypatch.setattr(floor, "seconds", lambda products, model: 0.0)
    monkeypatch.setattr(floor, "_reading", lambda numbers, dtype, device: numbers)
    model = on_meta(MOE)
    active = sum(count.active_parameters(model).values())
    assert floor.decode_step(model, 1, 9) == active - MOE.dim  # without the last norm
    unused = (MOE.experts - MOE.experts_per_token) * 3 * MOE.dim * MOE.expert_ffn
    assert floor.decode_step(model, 2, 9) == floor.decode_step(model, 64, 9) == active - MOE.dim + unused


def test_newton_schulz_as_torch_counts_it():
    from torch.utils.flop_counter import FlopCounterMode

    from minir1.optim import orthogonalize, split_parameters

    model = on_meta(DENSE)
    with FlopCounterMode(display=False) as counter:
        for w in split_parameters(model)[0]:
            orthogonalize(w.detach())
    assert sum(product.flops for product in floor.newton_schulz(model)) == counter.get_total_flops()


def test_the_growth_of_a_decode_step(tmp_path, capsys):
    sizes = {"rows": (1, 2), "lengths": (5, 9), "widths": (16, 32), "experts": (2, 4), "at_rows": 2, "steps": 2}
    config = growth.Config(**sizes, device="cpu", out=tmp_path / "growth.json", figure=tmp_path / "growth.png")
    figures = growth.main(config)
    assert json.loads(config.out.read_text()) == figures and config.figure.stat().st_size > 10_000
    keys = [f"{name}/{size}" for name, field in zip(growth.LABELS, list(sizes)[:4]) for size in sizes[field]]
    assert list(figures) == [f"{key}/{what}" for key in keys for what in ("seconds", "floor")]
    assert min(figures.values()) > 0 and "times the floor" in capsys.readouterr().out
    panels = growth.draw(figures, config.figure).axes
    assert [len(panel.lines) for panel in panels] == [2] * 4
    assert list(panels[0].lines[0].get_ydata()) == [1000 * figures[f"rows/{rows}/seconds"] for rows in (1, 2)]
    with pytest.raises(ValueError, match="widths = .*: multiples of 16"):
        growth.Config(widths=(40,))
    assert growth.wide(128) == growth.BASE


PEERS = peers.Config(
    prompts=2, num_generations=2, prompt_tokens=3, max_completion_length=(4, 5), qwen=replace(DENSE, vocab=40),
    qwen_rows=2, qwen_prompt=3, repeats=1, decode_steps=1,
)  # fmt: skip


def results_of(runs, repeats):
    """In place of `peers.alternate`: what each run returns."""
    return {name: run() for name, run in runs.items()}


def test_transformers_generates_as_many_tokens(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(peers, "alternate", results_of)
    cases = dict(peers.rollouts(PEERS))
    assert list(cases) == [f"rollout, {kind}, 4 × {n} tokens" for kind in ("MLA + MoE", "dense") for n in (4, 5)]
    for case, results in cases.items():
        tokens = int(case.split()[-2])
        assert results["ours"].length.tolist() == [3 + tokens] * 4
        assert results["transformers"].shape == (4, 3 + tokens)


def test_transformers_decodes_the_same_logits(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(peers, "alternate", results_of)
    for case, results in peers.decoding(PEERS):
        tolerance = {"rtol": 0, "atol": 1e-5 if case.endswith("float32") else 0.05}
        ours = results.pop("ours")
        assert len(results) == 2 and ours.std() > 0.1
        for theirs in results.values():
            torch.testing.assert_close(ours, theirs.logits[:, -1].float(), **tolerance)


def test_trl_scores_as_many_answers_of_the_same_length(monkeypatch):
    pytest.importorskip("trl")
    lengths, rewarded = [], peers.rewarded

    def spy(completions, **columns):
        lengths.append([len(ids) for ids in columns.get("completion_ids", [])])
        return rewarded(completions)

    monkeypatch.setattr(peers, "rewarded", spy)
    ((case, times),) = peers.grpo(PEERS)
    assert case == "GRPO step, dense, 4 × 4 tokens" and lengths == [[4] * 4, []] * 2  # TRL, ours, twice
    assert list(times) == ["ours", "TRL"] and all(len(seconds) == 1 and seconds[0] > 0 for seconds in times.values())


def test_the_ratio_is_theirs_by_ours(tmp_path, monkeypatch, capsys):
    case = "case", {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 2.0, 8.0]}  # ratios 3, 1, 2
    monkeypatch.setitem(peers.PARTS, "grpo", lambda config: [case])
    figures = peers.main(replace(PEERS, parts=("grpo",), out=tmp_path / "peers.json"))
    assert figures == {"case/ours/seconds": 2, "case/theirs/seconds": 3, "case/theirs/ratio": 2}
    assert json.loads((tmp_path / "peers.json").read_text()) == figures
    assert "2.00" in capsys.readouterr().out
    times = peers.alternate({"a": lambda: None, "b": lambda: None}, 3)
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_engine_generate_and_transformers_answer_the_same_prompts(tmp_path):
    pytest.importorskip("transformers")
    model, tokenizer = Transformer(replace(DENSE, vocab=128)), word_level((), 99)
    hf.save(model, tokenizer, tmp_path)
    config = serving.Config(tmp_path, clients=3, max_completion_length=4, repeats=1)
    figures = serving.without_server(model.eval(), tokenizer, tmp_path, [[20, 21], [22], [23, 24, 25]], config)
    assert list(figures) == [
        f"{way}/{how}/tok_s" for way in ("engine", "generate", "transformers") for how in ("one", "many")
    ]
    assert min(figures.values()) > 0
