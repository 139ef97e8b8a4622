"""The token inspector: a page of a run's rollouts, each token coloured by what the training step did to it.

    python -m experiments.inspect_tokens runs/demo/rl
    python -m experiments.inspect_tokens runs/demo/rl --step 21 --groups 4

Reads what an RL script stored with --store-steps (minir1/rollout_file.py) and writes one HTML file, which needs neither
a network nor another file. A token is coloured by one of these; the others stand in its tooltip:

    advantage     A_t
    log-prob      log π_old(x_t | x_<t), of the policy that sampled
    ratio         r_t = π_θ(x_t | x_<t) / π_old(x_t | x_<t), where π_θ is the policy after the last update of the step
    clip          whether the objective has no gradient at r_t, because the ratio has left the interval
    KL            k3_t = π_ref / π_old - log(π_ref / π_old) - 1 at the sampled token
    entropy       of π_old(· | x_<t), nats
    value         V(s_t), before the step, and its error R_t - V(s_t)
    experts       those that π_θ sends the token to, layer by layer

What a run has not stored is left out: no clip in REINFORCE, no value without a critic, no experts in a dense model.
Whitespace is visible; a token that is a part of a character shows its bytes, and the token that completes it the
character.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from jinja2 import Environment
from torch import Tensor

from experiments.report_page import CONTROLS
from minir1 import cli, rollout_file
from minir1.files import read_json, replace_text
from minir1.log import run_holding
from minir1.losses import kl_k3
from minir1.rollout_file import Stored
from minir1.settings import at_least, new_file

HIDDEN = re.compile("[\u00ad\u061c\u200b\u2060-\u2064\ufeff\U000e0000-\U000e007f]")  # nothing is drawn for them
JOINERS = re.compile("[\u200c\u200d\ufe00-\ufe0f]+")  # nor for these alone; in a token with others they shape it
MANY = 200_000  # tokens in a page, above which a browser becomes slow


@dataclass(frozen=True)
class Config:
    """Which run, and which of its steps."""

    run: Annotated[Path, tyro.conf.Positional]  # the folder of a run
    step: int | None = None  # one that was stored; None: the last of them
    groups: int = 8  # problems in the page, at most, with all answers that were stored
    out: Path | None = None  # the page; None: RUN/rollouts/step-….html

    def __post_init__(self):
        at_least(self, 1, "step", "groups")
        new_file(self, "out")


class Quantity(NamedTuple):
    """What a token can be coloured by."""

    key: str
    label: str
    kind: str  # of the colour scale: diverging | sequential | flag | experts
    meaning: str


QUANTITIES = (
    Quantity("advantage", "advantage", "diverging", "A: above 0 the update makes the token likelier, below 0 rarer"),
    Quantity("logp", "log-prob", "sequential", "log π_old: how likely the token was when it was sampled"),
    Quantity("ratio", "ratio", "diverging", "r = π_θ / π_old: what the step did to the token's probability"),
    Quantity("clipped", "clip", "flag", "no gradient: the ratio has left the clip's interval"),
    Quantity("kl", "KL", "sequential", "k3: how far the sampling policy is from the reference at this token"),
    Quantity("entropy", "entropy", "sequential", "H(π_old): how undecided the policy was, in nats"),
    Quantity("value", "value", "diverging", "V: what the critic expected before the token"),
    Quantity("value_error", "value error", "diverging", "R - V: how much more came than the critic expected"),
    Quantity("experts", "experts", "experts", "the first expert that the router chose for the token"),
)


def quantities(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is coloured or shown, from what is stored: name -> [N], fp32 or bool."""
    logp, after = tensors["logp"], tensors["updated_logp"]
    shown = {"logp": logp, "ratio": (after - logp).exp(), "updated_logp": after, "entropy": tensors["entropy"]}
    shown |= {name: tensors[name] for name in ("advantage", "clipped", "ref_logp", "returns") if name in tensors}
    if "ref_logp" in tensors:
        shown["kl"] = kl_k3(logp, tensors["ref_logp"])
    if "values" in tensors:
        shown |= {"value": tensors["values"], "value_error": tensors["returns"] - tensors["values"]}
    return shown


def spelt(text: str) -> str:
    """Characters that are not drawn, or that turn the direction of a text, as ‹u+202e›."""
    number = lambda match: "".join(f"‹u+{ord(sign):04x}›" for sign in match[0])
    text = HIDDEN.sub(number, CONTROLS.sub(number, text))
    return JOINERS.sub(number, text) if JOINERS.fullmatch(text) else text


def visible(parts: Sequence[bytes]) -> list[str]:
    """The text of each of some tokens in order. Bytes of a character that is not complete yet are shown as ‹e4 bd›."""
    decoder, texts = codecs.getincrementaldecoder("utf-8")("replace"), []
    for part in parts:
        text = spelt(decoder.decode(part))
        open_bytes = decoder.getstate()[0]
        tail = part[len(part) - min(len(part), len(open_bytes)) :]
        texts.append(text + (f"‹{tail.hex(' ')}›" if tail else "") or "‹›")
    return texts


def numbers(values: Tensor) -> list:
    """JSON numbers of six digits; None for those that are not finite; bool as it is."""
    if values.dtype == torch.bool:
        return values.int().tolist()
    return [float(f"{x:.6g}") if abs(x) < float("inf") else None for x in values.tolist()]


def page_data(stored: Stored, groups: int, name: str, settings: dict | None = None) -> dict:
    """What the page shows, for JSON. groups: how many, at most; those whose rewards differ come first. name: of the
    run; settings: its config.json."""
    about, tensors = stored
    equal = [len({a["reward"] for a in answers}) == 1 for answers in about["answers"]]
    order = sorted(range(len(equal)), key=lambda g: equal[g])[:groups]
    pieces: dict[tuple[str, str], int] = {}  # (token, its text here) -> index
    special, hexadecimal = {str(t) for t in about["special"]}, about["bytes"]

    def indices(tokens: Tensor) -> list[int]:
        words = [str(token) for token in tokens.tolist()]
        texts = visible([bytes.fromhex(hexadecimal[word]) for word in words])
        return [pieces.setdefault(pair, len(pieces)) for pair in zip(words, texts)]

    prompts = tensors["prompt_tokens"].split(tensors["prompt_length"].tolist())
    lengths = tensors["length"].tolist()
    shown = {key: values.split(lengths) for key, values in quantities(tensors).items()}
    tokens, experts = tensors["tokens"].split(lengths), tensors.get("experts")
    routed = None if experts is None else experts.split(lengths)

    def answer(g: int, i: int) -> dict:
        row = g * about["G"] + i
        columns = {key: numbers(values[row]) for key, values in shown.items()}
        if routed is not None:
            columns["experts"] = routed[row].tolist()  # [T][L_moe][K_r]
        judged = about["answers"][g][i]
        judged = judged | {"reason": spelt(judged["reason"])}
        return {**judged, "number": i + 1, "tokens": indices(tokens[row]), "columns": columns}

    def group(g: int) -> dict:
        problem = {key: spelt(text) for key, text in about["problems"][g].items()}
        answers = sorted((answer(g, i) for i in range(about["G"])), key=lambda a: -a["reward"])
        return {**problem, "number": g + 1, "tokens": indices(prompts[g]), "answers": answers}

    shown_groups = [group(g) for g in order]
    return {
        "run": name,
        "step": about["step"],
        "stored": len(about["problems"]),
        "steps": (settings or {}).get("steps"),
        "masked": bool((settings or {}).get("mask_truncated")),
        "quantities": [q._asdict() for q in QUANTITIES if q.key in [*shown, *(["experts"] if routed else [])]],
        "groups": shown_groups,
        "pieces": [[text, int(word), hexadecimal[word], int(word in special)] for word, text in pieces],
    }


def html(data: dict) -> str:
    """The page, from inspect_tokens.html, .css and .js beside this file.

    What a model wrote is in the page as JSON alone, which the script shows as text. The browser runs no other script
    and loads nothing: the policy in the page's head names this script and this style by their SHA-256.
    """
    environment = Environment(autoescape=True)
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    page, style, script = (Path(__file__).with_suffix(end).read_text("utf-8") for end in (".html", ".css", ".js"))
    inside = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return environment.from_string(page).render(data=data, style=style, script=script, json=inside)


def main(config: Config) -> Path:
    """Write the page, and say how large it is."""
    run = run_holding(config.run, rollout_file.FOLDER)
    stored = rollout_file.read(run, config.step)
    settings = read_json(run / "config.json", "every run has one")
    data = page_data(stored, config.groups, run.resolve().name, settings)
    step = stored.about["step"]
    path = config.out or run / rollout_file.FOLDER / f"step-{step:06d}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, html(data))
    P, answers = len(data["groups"]), [a for group in data["groups"] for a in group["answers"]]
    count = sum(len(a["tokens"]) for a in answers)
    size = path.stat().st_size / 1e6
    print(
        f"{path}: step {step}, {P} of {data['stored']} stored groups, {len(answers):,} answers, {count:,} tokens, "
        f"{size:.1f} MB: open it in a browser"
    )
    if P < data["stored"]:
        print(f"--groups {data['stored']} shows all of them")
    if count > MANY:
        print(f"warning: a browser becomes slow above {MANY:,} tokens: choose fewer --groups than {P}")
    return path


if __name__ == "__main__":
    cli.run(main, Config)
