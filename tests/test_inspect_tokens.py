"""rollout_file.py and inspect_tokens.py: what is stored, its numbers in the page, and the page in a browser."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import pytest
import torch
from toys import DENSE, MOE

from experiments import inspect_tokens, ppo, r1_zero
from experiments.inspect_tokens import Config, numbers, page_data, quantities, visible
from minir1 import rollout_file
from minir1.judge import Answer
from minir1.log import Run
from minir1.losses import clipped_surrogate, is_clipped
from minir1.model.transformer import Transformer
from minir1.policy import logprobs
from minir1.rollout import collect
from minir1.rollout_file import Stored, stored_steps
from minir1.tasks import Problem
from minir1.tokenizer import train_bpe

RL = r1_zero.Config(
    steps=4, prompts=3, num_generations=4, max_completion_length=24, min_mixed=0.0, eval_every=2, eval_problems=3,
    eval_answers=1, beta=0.01, learning_rate=3e-2, warmup=0, num_minibatches=4, store_groups=2,
)  # fmt: skip
SCRIPT = "</script><script>document.title='owned'</script>"


# ---- what is stored ----------------------------------------------------------------------------


@pytest.mark.parametrize("count, steps", [(0, set()), (1, {9}), (2, {1, 9}), (3, {1, 5, 9}), (99, set(range(1, 10)))])
def test_the_steps_that_are_stored_are_spread(count, steps):
    assert stored_steps(9, count) == steps
    assert stored_steps(1, count) == ({1} if count else set())


def of_a_model(config, tmp_path, groups=2, **more):
    """(model as updated, rollout of P = 3, G = 2, advantage [B], what was stored)."""
    tokenizer = train_bpe(["make 24 from 3,4 你好 "] * 9, 300)
    config = replace(config, vocab=tokenizer.size)
    model = Transformer(config)
    prompts = [tokenizer.encode(text) for text in ("make 24", "你好 3", "from 3,4,4")]
    rollout = collect(model, prompts, answers=2, max_tokens=9, stop=tokenizer.eos, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p) * p.abs().mean()
    problems = [Problem(f"problem {p}", f"reference {p}") for p in range(3)]
    answers = [[Answer("", 1, i > 0, i == 0, True, reason="why") for i in range(2)] for _ in range(3)]
    judged, advantage = (problems, answers, torch.arange(6.0).view(3, 2)), torch.tensor([1.0, -1, 2, 0, 3, -3])
    settings = {"groups": groups, "microbatch": 20, "clipped": partial(is_clipped, clip_low=0.1, clip_high=0.1)}
    ref_logp = rollout.logp - 0.5 * rollout.mask
    tmp_path.mkdir(exist_ok=True)
    settings |= {"advantage": advantage, "ref_logp": ref_logp, "returns": None, **more}
    path = rollout_file.store(tmp_path, 7, model, tokenizer, rollout, judged, **settings)
    assert [p.name for p in path.parent.iterdir()] == ["step-000007.safetensors"]
    return model, rollout, advantage, rollout_file.read(tmp_path), tokenizer


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_the_first_groups_are_stored_without_padding(config, tmp_path):
    model, rollout, advantage, (about, tensors), tokenizer = of_a_model(config, tmp_path)
    mask = rollout.mask & (rollout.group < 2).unsqueeze(1)
    assert torch.equal(tensors["tokens"].long(), rollout.tokens[mask])
    assert tensors["length"].tolist() == rollout.mask[:4].sum(1).tolist() and (about["step"], about["G"]) == (7, 2)
    assert torch.equal(tensors["logp"], rollout.logp[mask]) and torch.equal(tensors["entropy"], rollout.entropy[mask])
    torch.testing.assert_close(tensors["updated_logp"], logprobs(model, rollout, 10**6)[mask])
    assert (tensors["updated_logp"] != tensors["logp"]).any()
    spread = advantage.unsqueeze(1).expand_as(mask)
    assert torch.equal(tensors["advantage"], spread[mask])
    assert torch.equal(tensors["ref_logp"], rollout.logp[mask] - 0.5) and "returns" not in tensors
    (prompt, other) = tensors["prompt_tokens"].split(tensors["prompt_length"].tolist())
    assert tokenizer.decode(prompt.tolist()) == "make 24" and tokenizer.decode(other.tolist()) == "你好 3"
    assert about["problems"][1] == {"prompt": "problem 1", "reference": "reference 1"} and len(about["problems"]) == 2
    assert [a["verdict"] for a in about["answers"][0]] == ["right", "wrong"]
    assert [a["reward"] for group in about["answers"] for a in group] == [0, 1, 2, 3]
    for token in tensors["tokens"].tolist():
        assert bytes.fromhex(about["bytes"][str(token)]) == tokenizer.bytes_of(token)
    assert set(about["special"]) <= set(tensors["tokens"].tolist()) and tokenizer.encode("m")[0] not in about["special"]
    size = (tmp_path / "rollouts" / "step-000007.safetensors").stat().st_size
    N, routed = int(mask.sum()), config.moe_layers * config.experts_per_token
    per_token = sum(t[0].numel() * t.element_size() for t in tensors.values() if len(t) == N)
    assert per_token == 25 + routed and size > per_token * N  # as the docstring says


def test_the_experts_are_those_of_the_updated_policy(tmp_path):
    model, rollout, _, (_, tensors), _ = of_a_model(MOE, tmp_path)
    row, record = rollout.select(torch.tensor([1])), []
    model.logprob(row.tokens, lengths=row.length, record=record)
    (routing,) = record
    start, end = rollout.mask[0].sum(), rollout.mask[:2].sum()
    assert torch.equal(tensors["experts"][start:end, 0].long(), routing.chosen[row.mask[0]])
    assert tensors["experts"].dtype == torch.uint8 and (tmp_path / "rollouts").is_dir()
    assert "experts" not in of_a_model(DENSE, tmp_path / "dense")[3].tensors


def test_clipped_tokens_are_those_without_a_gradient(tmp_path):
    """At the stored log-probs, by autograd through the loss itself."""
    tensors = of_a_model(DENSE, tmp_path, groups=3)[3].tensors
    logp = tensors["updated_logp"].clone().requires_grad_()
    clipped_surrogate(logp, tensors["logp"], tensors["advantage"], 0.1, 0.1).sum().backward()
    moves = tensors["advantage"] != 0
    assert torch.equal(tensors["clipped"][moves], logp.grad[moves] == 0) and not tensors["clipped"][~moves].any()
    assert 0 < tensors["clipped"].sum() < len(logp)


def test_replayed_routes_are_those_of_the_sampler(tmp_path):
    model, rollout, advantage, (about, tensors), tokenizer = of_a_model(MOE, tmp_path)
    routes = tensors["experts"].new_zeros(*rollout.tokens.shape, *tensors["experts"].shape[1:], dtype=torch.int16)
    routes[..., 1] = 3
    rollout = replace(rollout, routes=routes)
    logp, experts = rollout_file.updated(model, rollout, 20)
    torch.testing.assert_close(logp, logprobs(model, rollout, 10**6, replay=True))
    assert experts is routes and (logp[rollout.mask] != logprobs(model, rollout, 10**6)[rollout.mask]).any()


def test_another_old_policy_replaces_the_sampler(tmp_path):
    old = torch.full((6, 40), -2.0)
    tensors = of_a_model(DENSE, tmp_path, logp=old)[3].tensors
    assert (tensors["logp"] == -2).all()
    expected = is_clipped(tensors["updated_logp"], tensors["logp"], tensors["advantage"], 0.1, 0.1)
    assert torch.equal(tensors["clipped"], expected)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no rollouts/: the RL scripts store some with --store-steps"):
        rollout_file.read(tmp_path)
    of_a_model(DENSE, tmp_path)
    with pytest.raises(ValueError, match=r"^step = 8: .* stored rollouts at 7$"):
        rollout_file.read(tmp_path, 8)
    path = tmp_path / "rollouts" / "step-000007.safetensors"
    for name in ("step-000007 (copy).safetensors", "step-best.safetensors", "step-8.safetensors"):
        path.with_name(name).touch()
    assert rollout_file.steps_of(tmp_path) == [7]  # no other name is one of a run
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="step-000007.safetensors is damaged, or not written by minir1"):
        rollout_file.read(tmp_path)
    for name, changed in (("entropy", "entropi"), ("special", "speziel")):
        path.write_bytes(whole.replace(name.encode(), changed.encode()))
        with pytest.raises(ValueError, match=f"step-000007.safetensors lacks {name}: another version"):
            rollout_file.read(tmp_path)


def test_a_resumed_run_deletes_what_later_steps_stored(tmp_path):
    run = Run(tmp_path, {}, "off").start()
    run.log(4, {})
    (tmp_path / "rollouts").mkdir()
    for name in ("step-000004.safetensors", "step-000004.html", "step-000005.safetensors", "step-000005.html"):
        (tmp_path / "rollouts" / name).write_text("")
    (tmp_path / "rollouts" / "step-000006.safetensors.tmp").write_text("")
    run.start(4)
    run.close()
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == ["step-000004.html", "step-000004.safetensors"]


# ---- runs --------------------------------------------------------------------------------------


def by_length(answers, config) -> torch.Tensor:
    """A reward that differs within groups, whatever the toy base can do."""
    return torch.tensor([[float(len(a.text)) for a in group] for group in answers])


def test_a_run_stores_and_its_page_is_written(toy_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(r1_zero, "reward", by_length)
    config = replace(RL, checkpoint=toy_base("moe") / "checkpoint", out=tmp_path / "run")
    r1_zero.main(config)
    assert rollout_file.steps_of(config.out) == [1, 3, 4]
    about, tensors = rollout_file.read(config.out, 3)
    assert len(about["problems"]) == 2 and len(tensors["length"]) == 8
    assert (tensors["updated_logp"] - tensors["logp"]).abs().max() > 1e-3  # as updated, not as sampled
    plain = replace(config, out=tmp_path / "without", store_steps=0)
    r1_zero.main(plain)
    assert not (plain.out / "rollouts").exists()
    weights = [next((c.out / "checkpoint").glob("step-000004/model.safetensors")).read_bytes() for c in (config, plain)]
    assert weights[0] == weights[1]  # storing changes nothing
    capsys.readouterr()
    page = inspect_tokens.main(Config(config.out, groups=1))
    said = capsys.readouterr().out
    assert page == config.out / "rollouts" / "step-000004.html" and "1 of 2 stored groups, 4 answers" in said
    assert "--groups 2 shows all of them" in said and f"{page.stat().st_size / 1e6:.1f} MB" in said
    data = embedded(page)
    assert [q["key"] for q in data["quantities"]] == "advantage logp ratio clipped kl entropy experts".split()
    assert len(data["groups"]) == 1 and data["step"] == 4


def test_a_critic_is_stored_too_and_no_clip_where_there_is_none(toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "reward", lambda answers, *_: torch.ones(len(answers), len(answers[0])))
    fields = {name: getattr(RL, name) for name in ("prompts", "num_generations", "max_completion_length", "min_mixed")}
    fields |= {"steps": 2, "eval_every": 2, "eval_problems": 2, "eval_answers": 1, "beta": 0.0}
    ppo.main(ppo.Config(checkpoint=toy_base("dense") / "checkpoint", out=tmp_path, value_warmup=0, **fields))
    stored = rollout_file.read(tmp_path, 2)
    keys = [q["key"] for q in page_data(stored, 9, "run")["quantities"]]
    assert keys == "advantage logp ratio clipped entropy value value_error".split()  # no reference, no experts
    assert stored.tensors["values"].abs().max() > 0
    without = Stored(stored.about, {k: v for k, v in stored.tensors.items() if k not in ("clipped", "values")})
    assert [q["key"] for q in page_data(without, 9, "run")["quantities"]] == "advantage logp ratio entropy".split()


def embedded(page: Path) -> dict:
    """The data in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


# ---- the numbers in the page -------------------------------------------------------------------


def made() -> Stored:
    """Two problems with two answers each; the second problem's are better, so its order changes. N = 9 tokens."""
    words = ["<think>", " 3", "\n", "e4", "bda0", SCRIPT, "<|endoftext|>", "make 9 ", "\t<b>"]
    about = {
        "step": 120, "G": 2, "special": [0, 6], "temperature": 1.0,
        "bytes": {str(i): word if word in ("e4", "bda0") else word.encode().hex() for i, word in enumerate(words)},
        "problems": [{"prompt": "make 9 from <b>3,3</b>", "reference": "3*3"}, {"prompt": "other", "reference": ""}],
        "answers": [
            [made_answer(0.1, "wrong", truncated=True), made_answer(1.1, "right")],
            [made_answer(0.0, "wrong", format=False), made_answer(1.0, "right")],
        ],
    }  # fmt: skip
    half, ratio = math.log(0.5), torch.tensor([1.5, 1.0, 0.5, 1.0, 1.1, 1.5, 0.7, 1.0, 1.0])
    advantage = torch.tensor([-1.0, -1, -1, 2, 2, 2, -3, 4, 4])
    logp = torch.full((9,), half)
    tensors = {
        "tokens": torch.tensor([0, 1, 2, 3, 4, 5, 8, 1, 6]), "length": torch.tensor([3, 3, 1, 2]),
        "prompt_tokens": torch.tensor([7, 1, 7]), "prompt_length": torch.tensor([2, 1]),
        "logp": logp, "updated_logp": logp + ratio.log(), "ref_logp": logp + math.log(2), "entropy": torch.ones(9) / 3,
        "advantage": advantage, "clipped": is_clipped(logp + ratio.log(), logp, advantage, 0.2, 0.2),
        "experts": torch.tensor([[[0, 1], [2, 3]]] * 8 + [[[-1, -1], [-1, -1]]], dtype=torch.int16),
    }  # fmt: skip
    return Stored(about, tensors)


def made_answer(reward, verdict, **more):
    return {"reward": reward, "verdict": verdict, "truncated": False, "format": True, "reason": "", **more}


def test_quantities_by_hand():
    shown = quantities(made().tensors)
    torch.testing.assert_close(shown["ratio"], torch.tensor([1.5, 1.0, 0.5, 1.0, 1.1, 1.5, 0.7, 1.0, 1.0]))
    torch.testing.assert_close(shown["kl"], torch.full((9,), 2 - math.log(2) - 1))  # π_ref/π - log(π_ref/π) - 1
    assert shown["clipped"].tolist() == [False, False, True, False, False, True, True, False, False]
    more = made().tensors | {"values": torch.full((9,), 0.25), "returns": torch.ones(9)}
    assert quantities(more)["value_error"].tolist() == [0.75] * 9


def test_the_page_has_the_numbers_of_each_token_sorted_by_reward():
    data = page_data(made(), 8, "run")
    (better, worse), second = data["groups"][0]["answers"], data["groups"][1]["answers"]
    assert (better["number"], worse["number"], better["reward"]) == (2, 1, 1.1) and second[0]["reward"] == 1.0
    assert better["columns"]["ratio"] == [1.0, 1.1, 1.5] and better["columns"]["clipped"] == [0, 0, 1]
    assert better["columns"]["kl"] == [float(f"{1 - math.log(2):.6g}")] * 3
    assert better["columns"]["experts"][0] == [[0, 1], [2, 3]]
    words = [[data["pieces"][i][0] for i in answer["tokens"]] for answer in (better, worse)]
    assert words == [["‹e4›", "你", SCRIPT], ["<think>", " 3", "\n"]]
    assert {piece[0]: piece[3] for piece in data["pieces"]}["<think>"] == 1
    assert [data["pieces"][i][0] for i in data["groups"][0]["tokens"]] == ["make 9 ", " 3"]
    assert len(page_data(made(), 1, "run")["groups"]) == 1


def test_groups_whose_rewards_differ_come_first():
    """They keep their number; of equal kinds the order stays."""
    stored = made()
    for answer in stored.about["answers"][0]:
        answer["reward"] = 1.0
    for groups, order in ((8, [2, 1]), (1, [2])):
        assert [group["number"] for group in page_data(stored, groups, "run")["groups"]] == order
    assert [group["number"] for group in page_data(made(), 8, "run")["groups"]] == [1, 2]


def test_parts_of_characters_and_controls_are_visible():
    assert visible([b"\xe4", b"\xbd\xa0"]) == ["‹e4›", "你"]
    assert visible([b"a \xe4\xbd", b"\xa0b\xf0\x9f", b"\xa4", b"\x96"]) == ["a ‹e4 bd›", "你b‹f0 9f›", "‹a4›", "🤖"]
    assert visible([b"\xe4", b"x", b"\xbd"]) == ["‹e4›", "\ufffdx", "\ufffd"]  # no character
    assert visible(["\u202e\x07".encode(), b"", "👨‍👩‍👧".encode()]) == ["‹u+202e›‹u+0007›", "‹›", "👨‍👩‍👧"]


def test_what_is_not_drawn_is_visible():
    parts = ["a\u200bb", "\ufeff", "\u200d", "👩\u200d🔧", "❤\ufe0f", "\u061c\U000e0041"]
    shown = ["a‹u+200b›b", "‹u+feff›", "‹u+200d›", "👩\u200d🔧", "❤\ufe0f", "‹u+061c›‹u+e0041›"]
    assert visible([part.encode() for part in parts]) == shown
    about, tensors = made()
    about["problems"][0] = {"prompt": "a \u202e b", "reference": "\u200b"}
    about["answers"][0][0]["reason"] = "\u2066"
    group = page_data(Stored(about, tensors), 1, "run")["groups"][0]
    assert (group["prompt"], group["reference"]) == ("a ‹u+202e› b", "‹u+200b›")
    assert group["answers"][1]["reason"] == "‹u+2066›"


def test_a_page_in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_file, "read", lambda *_: made())
    (tmp_path / "config.json").write_text("{}")
    page = tmp_path / "new" / "folder" / "page.html"
    assert inspect_tokens.main(Config(tmp_path, out=page)) == page and page.stat().st_size > 1000


def test_the_folder_of_the_demonstration_stands_for_its_last_run(tmp_path, capsys):
    of_a_model(DENSE, tmp_path / "rl")
    (tmp_path / "rl" / "config.json").write_text("{}")
    (tmp_path / "base").mkdir()
    page = inspect_tokens.main(Config(tmp_path))
    assert page == tmp_path / "rl" / "rollouts" / "step-000007.html" and page.is_file()
    with pytest.raises(ValueError, match=r"base holds no rollouts/: the RL scripts store some"):
        inspect_tokens.main(Config(tmp_path / "base"))
    with pytest.raises(ValueError, match="none is no folder: need the folder of a run"):
        inspect_tokens.main(Config(tmp_path / "none"))


def test_numbers_are_json():
    assert numbers(torch.tensor([1 / 3, float("inf"), -0.0, float("nan")])) == [0.333333, None, -0.0, None]
    assert numbers(torch.tensor([True, False])) == [1, 0]


def test_a_page_with_very_many_tokens_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout_file, "read", lambda *_: made())
    monkeypatch.setattr(inspect_tokens, "MANY", 8)
    (tmp_path / "config.json").write_text('{"steps": 200, "mask_truncated": true}')
    inspect_tokens.main(Config(tmp_path, out=tmp_path / "page.html"))
    assert embedded(tmp_path / "page.html")["masked"] and "step 120 of 200" in (tmp_path / "page.html").read_text()
    assert "9 tokens" in (said := capsys.readouterr().out)
    assert "warning: a browser becomes slow above 8 tokens: choose fewer --groups than 2" in said


# ---- the page in a browser ---------------------------------------------------------------------


@pytest.fixture
def page(browser, tmp_path, request):
    """The page of `made`, opened as a file, or of what a test names; page.requests has what it asked for, page.errors
    what went wrong."""
    file = tmp_path / "page.html"
    stored = getattr(request, "param", made)()
    file.write_text(inspect_tokens.html(page_data(stored, 8, "run <i>")), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.set_default_timeout(10_000)
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    yield page
    assert page.requests == [file.as_uri()] and not page.errors
    page.close()


def shade(page, index: int) -> str:
    """The background of a token of the first answer shown."""
    return page.evaluate("i => getComputedStyle(document.querySelectorAll('.answer .t')[i]).backgroundColor", index)


def choose(page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).click()


def test_what_a_model_wrote_is_text(page):
    assert page.title() == "run <i>, step 120: token inspector"
    assert SCRIPT in page.inner_text(".answer .tokens") and page.locator("#groups b").count() == 4  # of the verdicts
    assert page.inner_text("h2 >> nth=0") == "make 9 from <b>3,3</b>"
    assert page.locator("script").count() == 2


def test_answers_are_sorted_and_summed_up(page):
    rewards = page.locator(".side").all_inner_texts()
    assert [re.search("reward (.*)", text)[1] for text in rewards] == ["1.1", "0.1", "1", "0"]
    assert "truncated" in rewards[1] and "badly formed" in rewards[3] and "33 % clipped" in rewards[0]
    assert "advantage +2" in rewards[0] and "advantage −1" in rewards[1]
    assert page.locator(".strip >> nth=0").locator("button").count() == 2
    assert "1 of 2 right · mean reward 0.6 · reference 3*3" in page.inner_text(".head >> nth=0")
    assert "0.55" in page.inner_text("#facts")
    page.locator(".strip button >> nth=3").click()
    page.wait_for_selector(".answer.flash")


def test_hover_shows_all_numbers(page):
    assert page.locator("#tip").is_hidden()
    page.locator(".answer .t >> nth=2").hover()
    tip = page.inner_text("#tip").replace("\t", " ")
    numbers = "advantage A +2 | log π_old −0.6931 (50 %) | log π_θ, after the step −0.2877 (75 %)"
    numbers += " | ratio π_θ / π_old 1.5 | clip clipped: no gradient | log π_ref 0 (100 %) | KL to π_ref, k3 0.3069"
    numbers += " | entropy 0.3333 nats"
    for text in f"token 3 of 3 · id 5 | {numbers} | experts, MoE layer 2 2, 3".split(" | "):
        assert text in tip, tip
    page.locator(".answer .t >> nth=0").hover()
    assert "bytes e4" in page.inner_text("#tip") and "not clipped" in page.inner_text("#tip")
    page.locator("h1").hover()
    assert page.locator("#tip").is_hidden()
    page.locator(".answer .t >> nth=1").click()  # keeps it
    page.locator("h1").hover()
    assert "你" in page.inner_text("#tip strong")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_another_quantity_recolours(page):
    first = [shade(page, i) for i in range(3)]
    assert len(set(first)) == 1  # one advantage for the whole answer
    choose(page, "ratio")
    none, more, most = (shade(page, i) for i in range(3))
    assert none.endswith(", 0)") and len({none, more, most}) == 3 and page.url.endswith("#ratio")
    assert "π_θ / π_old" in page.inner_text("#meaning") and "1.5" in page.inner_text("#scale")
    choose(page, "clip")
    assert shade(page, 0) == shade(page, 1) != shade(page, 2)
    choose(page, "experts")
    before = shade(page, 0)
    page.select_option("#scale select", label="MoE layer 2")
    assert shade(page, 0) != before and re.search(r"layer 2\s+2: 89 %$", page.inner_text("#scale"))
    page.locator(".answer .t >> nth=7").hover()  # 8 of 9 tokens have experts
    assert "MoE layer 2\tnot recorded" in page.inner_text("#tip")
    page.reload()  # the address keeps the choice
    assert page.get_by_role("radio", name="experts").get_attribute("aria-checked") == "true"
    page.requests.pop()


@pytest.mark.parametrize("typed, shown", [("log-prob",) * 2, ("logp", "log-prob"), ("KL", "KL"), ("clip",) * 2])
def test_the_address_takes_keys_and_the_texts_of_the_buttons(page, typed, shown):
    page.goto(page.url + "#" + typed)
    page.reload()
    assert page.get_by_role("radio", name=shown, exact=True).get_attribute("aria-checked") == "true"
    del page.requests[1:]


def test_in_a_frame_as_the_notebook_shows_it(browser, tmp_path):
    """A frame's srcdoc has no address to keep the choice in."""
    inside = escape(inspect_tokens.html(page_data(made(), 8, "run")))
    (tmp_path / "outer.html").write_text(f'<iframe srcdoc="{inside}" width="950" height="700"></iframe>', "utf-8")
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "outer.html").as_uri())
    frame = page.frames[1]
    before = shade(frame, 2)
    choose(frame, "ratio")
    assert shade(frame, 2) != before and "π_θ / π_old" in frame.inner_text("#meaning") and not errors
    page.close()


def test_filters(page):
    count = lambda: page.inner_text("#count")
    assert count() == "4 of 4 answers"
    choose(page, "right")
    assert count() == "2 of 4 answers" and page.locator(".answer:visible").count() == 2
    choose(page, "truncated")
    assert count() == "1 of 4 answers" and page.locator(".group:visible").count() == 1
    choose(page, "all")
    page.fill("#search", "你")
    assert count() == "1 of 4 answers"
    page.fill("#search", "OTHER")
    assert count() == "2 of 4 answers"
    page.fill("#search", "nothing like it")
    assert count() == "no answer matches"
    page.fill("#search", "")
    page.check("#mixed-only")
    assert count() == "4 of 4 answers"  # both groups are mixed
    page.evaluate("data.groups[1].answers.forEach((a) => { a.reward = 1; }); filter()")
    assert count() == "2 of 4 answers" and page.locator(".group:visible").count() == 1
    page.uncheck("#mixed-only")
    page.check("#clipped-only")
    assert count() == "3 of 4 answers" and page.locator(".t.clipped").count() == 3
    opacity = "e => getComputedStyle(e).opacity"
    assert page.locator(".answer .t >> nth=0").evaluate(opacity) == "0.3"
    assert page.locator(".t.clipped >> nth=0").evaluate(opacity) == "1"


def test_by_keyboard(page):
    page.focus(".answer .tokens >> nth=0")
    right, left = "ArrowRight", "ArrowLeft"
    for key, number in ((right, 1), (right, 2), ("End", 3), (right, 3), (left, 2), ("Home", 1)):
        page.keyboard.press(key)
        assert f"token {number} of 3" in page.inner_text("#tip")
    assert page.text_content("#said") == "‹e4›: advantage A +2"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.get_by_role("radio", name="advantage").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="log-prob").get_attribute("aria-checked") == "true"


def test_dark_and_narrow(page):
    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = ground()
    page.emulate_media(color_scheme="dark")
    assert ground() != light
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    page.locator(".answer .t >> nth=2").click()
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def odd() -> Stored:
    """As `made`, with a very long token, nothing finite, no verdict, and an answer without tokens."""
    about, tensors = made()
    about["bytes"]["1"] = ("W" * 3000).encode().hex()
    for group in about["answers"]:
        for answer in group:
            answer["verdict"] = "unjudged"
    nothing = torch.full((9,), math.nan)
    tensors |= {"length": torch.tensor([3, 4, 0, 2]), "updated_logp": nothing, "entropy": nothing, "advantage": nothing}
    return Stored(about, tensors)


@pytest.mark.parametrize("page", [odd], indirect=True)
def test_odd_values(page):
    facts = page.inner_text("#facts")
    assert re.search(r"right\s+none\s", facts) and re.search(r"mean entropy\s+not finite", facts)
    assert "advantage not finite" in page.inner_text(".side >> nth=0")
    for key in ("log-prob", "ratio", "clip", "KL", "entropy", "experts"):
        choose(page, key)
    page.focus(".answer .tokens >> nth=3")  # the empty one
    page.keyboard.press("ArrowRight")
    assert not page.errors
    page.locator(".answer .t", has_text="WWW").first.evaluate("span => show(span)")
    tip = page.locator("#tip").bounding_box()
    assert tip["height"] < 600 and page.inner_text("#tip strong").endswith("W …")


def lengthy() -> Stored:
    """As `made`, with ten times 400 tokens in an answer."""
    about, tensors = made()
    many = {key: values.repeat_interleave(400, 0) for key, values in tensors.items() if len(values) == 9}
    return Stored(about, tensors | many | {"length": tensors["length"] * 400})


@pytest.mark.parametrize("page", [lengthy], indirect=True)
def test_the_bar_hides_no_token_that_a_key_chose(page):
    page.focus(".answer .tokens >> nth=0")
    page.keyboard.press("End")
    page.keyboard.press("Home")
    bar, token = page.locator(".bar").bounding_box(), page.locator(".t.on").bounding_box()
    assert bar["y"] == 0 and token["y"] >= bar["height"]


def test_blanks_between_bytes_are_not_those_of_the_model(browser, tmp_path):
    about, tensors = made()
    about["bytes"]["3"] = "e4bd"
    (tmp_path / "page.html").write_text(inspect_tokens.html(page_data(Stored(about, tensors), 8, "run")), "utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator(".answer .t >> nth=0").locator(".space").count() == 0
    page.locator(".answer .t >> nth=0").hover()
    assert page.inner_text("#tip strong") == "‹e4 bd›"
    page.close()
