"""Odd and wrong values in config.json and adapter_config.json, compared with transformers and PEFT.

    python -m experiments.tools.fuzz_configs
    python -m experiments.tools.fuzz_configs --cases 20000 --seed 1

A case changes one field of a folder of toy size, of each supported class, and opens it. It passes where `hf.load`
raises ValueError within a few seconds, or computes the logits that transformers (PEFT for adapters) computes for the
same folder, tokens over a cache included. Any other exception and other logits are failures.

Where they refuse what is read here, a value passes if it cannot matter: the logits are those of the unchanged folder,
or those that they compute with the field left out (of null), or with the same number as a float (of an integer).

The fields are those of their configuration classes and all other names that their code reads from a configuration.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import peft
import torch
import transformers
from torch import Tensor

from experiments.tools.fuzz_values import ABSENT, CHOICES_OF_CONFIGS, READ_BY, ROPE, ROPE_KEYS, SHARED, values_of
from minir1 import cli
from minir1.log import progress, table
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.lora import adapters, add_adapters, save_adapters
from minir1.model.moe import MoE
from minir1.model.rope import RopeScaling
from minir1.model.transformer import Transformer
from minir1.settings import at_least
from minir1.tokenizer import word_level

V, T, FIRST = 64, 40, 24  # FIRST tokens in one pass, the others over the cache
SHAPE = {"vocab": V, "dim": 32, "layers": 2, "heads": 4, "ffn": 24, "init_std": 0.17, "max_positions": 64}
MLA = SHAPE | {"kv_lora": 12, "nope": 8, "rope": 8, "v_dim": 6, "experts": 4, "expert_ffn": 12}
YARN = RopeScaling("yarn", factor=4, original=16, mscale=0.707, mscale_all=0.707, fast=4, whole_pairs=False)
LLAMA3 = RopeScaling("llama3", factor=4, original=16, slow=1, fast=4)
MODELS = {
    "DeepseekV3": ModelConfig(**MLA, rope_scaling=YARN, rope_theta=100.0, route_scale=2.5, groups=2, groups_kept=1),
    "DeepseekV2": ModelConfig(**MLA, score="softmax", norm_topk=False, q_lora=10, groups=2, groups_kept=1),
    "Qwen2": dense(**SHAPE, rope_scaling=YARN, rope_theta=100.0, tied=True),
    "Qwen3": dense(**SHAPE, qkv_bias=False, qk_norm=True, head_dim=12, rope_theta=500.0),
    "Qwen3Moe": ModelConfig(
        **SHAPE, attention="gqa", qk_norm=True, head_dim=12, experts=4, shared_experts=0, expert_ffn=12, score="softmax"
    ),
    "Llama": dense(**SHAPE, qkv_bias=False, rope_scaling=LLAMA3),
    "Granite": dense(**SHAPE, qkv_bias=False, attention_scale=0.2, logit_scale=0.5, embedding_scale=2.0),
}
ADAPTED = {"adapters of Qwen2": "Qwen2", "adapters of DeepseekV3": "DeepseekV3"}  # dense, and with experts
X = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(5))
SLOW = 5.0  # seconds; a refusal takes milliseconds


@dataclass(frozen=True)
class Config:
    """Every change of a single field; with more cases than those, changes of two fields as well."""

    cases: int | None = None  # None: every single change, once
    seed: int = 0  # of their order, and of the pairs
    only: str = ""  # run only the cases whose line, as it is printed, contains this
    verbose: bool = False  # print each case before it runs

    def __post_init__(self):
        at_least(self, 1, "cases")
        at_least(self, 0, "seed")


@dataclass(frozen=True)
class Folder:
    """A saved model, or its adapters."""

    name: str
    path: Path
    file: str  # the one that is changed
    values: dict  # its content
    fields: list[tuple[str, ...]]  # that are changed: a name, or names of objects in objects
    others: set[str]  # names among them that are no fields, but read somewhere
    theirs: Callable[[], Tensor]
    logits: Tensor  # of the unchanged folder


@dataclass(frozen=True)
class Case:
    """Fields of a folder and the values they get."""

    folder: Folder
    changes: tuple[tuple[tuple[str, ...], object], ...]

    def __str__(self):
        shown = ("absent" if value is ABSENT else repr(value)[:80] for _, value in self.changes)
        return f"{self.folder.name}: " + ", ".join(
            f"{'.'.join(path)} = {value}" for (path, _), value in zip(self.changes, shown)
        )


# ---- folders -----------------------------------------------------------------------------------


def build(config: ModelConfig) -> Transformer:
    """A random model with random norm weights, biases, and selection bias."""
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 1:
            p += 0.2 * torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, MoE) and config.score == "sigmoid":
            module.bias.normal_(std=0.1)
    return model


@torch.no_grad()
def their_logits(model) -> Tensor:
    """Logits of X, of which the last tokens are read over a cache."""
    first = model(X[:, :FIRST], use_cache=True, return_dict=True)
    rest = model(X[:, FIRST:], past_key_values=first.past_key_values, use_cache=True, return_dict=True)
    return torch.cat((first.logits, rest.logits), 1)


def their_model(path: Path):
    """What transformers opens."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def open_theirs(path: Path) -> Tensor:
    """Logits of what transformers opens."""
    return their_logits(their_model(path))


def names_read(model_type: str, shared: bool) -> set[str]:
    """Names that the code of transformers for this type reads from a configuration; with `shared` also READ_BY."""
    root = Path(transformers.__file__).parent
    files = [*(root / "models" / model_type).glob("*.py")] + [root / f"{name}.py" for name in READ_BY if shared]
    pattern = r"config\.([a-z_]\w*)|config, \"(\w+)\"|kwargs\.(?:pop|get)\(\"(\w+)\"|config_dict\[\"(\w+)\"\]"
    return {next(filter(None, match)) for file in files for match in re.findall(pattern, file.read_text())}


def base_folders(root: Path, names=MODELS) -> Iterator[Folder]:
    """A folder of each class, as `hf.save` writes it, and, for what differs in it, as transformers does."""
    for name in names:
        older, newer = root / name, root / f"{name}, newer"
        hf.save(build(MODELS[name]), word_level((), 24), older)
        theirs = their_model(older)
        theirs.save_pretrained(newer)
        word_level((), 24).save(newer)
        files = {path: json.loads((path / "config.json").read_text()) for path in (older, newer)}
        for path, values in files.items():
            fields = {f.name for f in dataclasses.fields(theirs.config)} | values.keys() | set(ROPE)
            others = names_read(values["model_type"], shared=name in SHARED) | set(theirs.config.attribute_map)
            others |= set(CHOICES_OF_CONFIGS)
            if path == newer:
                fields, others = values.keys() - files[older].keys() | set(ROPE), set()
            paths = [(key,) for key in sorted(fields | others)]
            for block in ("rope_scaling", "rope_parameters"):
                paths += [(block, key) for key in ROPE_KEYS if values.get(block)]
            opened, logits = partial(open_theirs, path), hf.load(path)[0](X)
            yield Folder(path.name, path, "config.json", values, paths, others - fields, opened, logits)


def adapter_folders(root: Path, names=ADAPTED) -> Iterator[Folder]:
    """Folders of adapters, with every field that PEFT writes."""
    for name in names:
        config, path = MODELS[ADAPTED[name]], root / name
        hf.save(build(config), word_level((), 24), path / "base")
        model = build(config)
        add_adapters(model, rank=3, alpha=6.0)
        for adapter in adapters(model).values():
            adapter.B.data.normal_(std=0.1)
        save_adapters(model, path / "ours", path / "base")
        base = their_model(path / "base")
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(copy.deepcopy(base), path / "ours").save_pretrained(path / "theirs")
        values = json.loads((path / "theirs/adapter_config.json").read_text())
        known = {f.name for f in dataclasses.fields(peft.LoraConfig)} | values.keys() | {"new_in_a_later_version"}

        def theirs(path=path / "theirs", base=base) -> Tensor:
            return their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), path).eval())

        fields = [(key,) for key in sorted(known)]
        logits = hf.load(path / "theirs")[0](X)
        yield Folder(name, path / "theirs", "adapter_config.json", values, fields, set(), theirs, logits)


# ---- cases -------------------------------------------------------------------------------------


def cases(folders: list[Folder], config: Config) -> list[Case]:
    """Every change of one field, in an order drawn by the seed; then changes of two fields of a folder."""
    rng = random.Random(config.seed)
    values = lambda folder, path: values_of(folder.values, path, folder.others)
    single = [Case(f, ((path, value),)) for f in folders for path in f.fields for value in values(f, path)]
    single = [case for case in single if config.only in str(case)]
    rng.shuffle(single)
    chosen = single[: config.cases]
    while config.cases and len(chosen) < config.cases:
        folder = rng.choice(folders)
        paths = rng.sample(folder.fields, 2)
        chosen.append(Case(folder, tuple((path, rng.choice(values(folder, path))) for path in paths)))
    return chosen


def changed(values: dict, changes) -> dict:
    """The values with each change in its place; a path through something that is no object is left alone."""
    values = copy.deepcopy(values)
    for path, value in changes:
        inner = values
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(path[-1], None)
            if value is not ABSENT:
                inner[path[-1]] = value
    return values


# ---- verdicts ----------------------------------------------------------------------------------


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal logits, to the rounding of fp32."""
    return a is not None and b is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=2e-4)


def attempt(function: Callable[[], Tensor]) -> Tensor | None:
    """Their logits; None where they fail, in whatever way."""
    state = torch.random.get_rng_state()
    try:
        return function()
    except Exception:
        return None
    finally:
        torch.random.set_rng_state(state)


@torch.no_grad()
def run(case: Case) -> str:
    """'refused', 'equal', or what is wrong."""
    folder, file = case.folder, case.folder.path / case.folder.file

    def write(changes) -> None:
        file.write_text(json.dumps(changed(folder.values, changes)))

    try:
        write(case.changes)
        began = time.process_time()
        try:
            ours = hf.load(folder.path)[0](X)
        except ValueError:
            seconds = time.process_time() - began
            return "refused" if seconds < SLOW else f"refused after {seconds:.0f} s"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:100]}"
        theirs = attempt(folder.theirs)
        if theirs is not None:
            return "equal" if equal(ours, theirs) else f"logits differ by {(ours - theirs).abs().max():.2g}"
        if equal(ours, folder.logits):
            return "equal"
        for old, new in ((type(None), lambda v: ABSENT), (int, float)):
            changes = [(path, new(v) if type(v) is old else v) for path, v in case.changes]
            write(changes)
            if equal(ours, attempt(folder.theirs)):
                return "equal"
        return f"they fail, and the logits moved by {(ours - folder.logits).abs().max():.2g}"
    finally:
        write(())


def main(config: Config) -> dict[str, int]:
    """Run the cases; print failures and counts, which are returned. SystemExit if a case failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(60)
    transformers.utils.logging.disable_progress_bar()
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as root:
        folders = [*base_folders(Path(root)), *adapter_folders(Path(root))]
        chosen = cases(folders, config)
        began, total = time.perf_counter(), Counter()
        with progress(len(chosen), "cases") as advance:
            for case in chosen:
                if config.verbose:
                    print(case, flush=True)
                outcome = run(case)
                kind = outcome if outcome in ("refused", "equal") else "failed"
                counts.setdefault(case.folder.name, Counter())[kind] += 1
                total[kind] += 1
                advance()
                if kind == "failed":
                    print(f"{case}: {outcome}", flush=True)
    rows = [[name, *(f"{counts[name][kind]}" for kind in ("refused", "equal", "failed"))] for name in sorted(counts)]
    rows.append(["all", *(f"{total[kind]}" for kind in ("refused", "equal", "failed"))])
    table("changed files", ["folder", "refused", "equal", "failed"], rows)
    print(f"{total.total()} cases, {total['failed']} failures, {time.perf_counter() - began:.0f} s")
    if total["failed"]:
        sys.exit(1)
    return dict(total)


if __name__ == "__main__":
    cli.run(main, Config)
