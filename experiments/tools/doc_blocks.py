"""The generated blocks of README.md and docs/*.md: results -> text, by the name of the block.

A part of experiments/tools/render_docs.py, which writes them.
"""

from __future__ import annotations

import re
from functools import partial

from experiments import gallery, pretrain_text, reward_model, train_tokenizer
from experiments.benchmarks import bench_chat, serving, verifiers
from experiments.count import human
from experiments.studies import (
    algorithms,
    balance,
    curriculum,
    distill_vs_rl,
    distill_ways,
    estimators,
    group_size,
    hybrid,
    kl,
    long_tail,
    overoptimization,
    preferences,
    r1_seeds,
    reduction,
    routes,
    seeds,
    self_check,
    thinking,
)
from experiments.studies.long_context_figures import VARIANTS
from experiments.tools import departures, file_map, scaling, variants
from minir1.log import markdown_table
from minir1.metrics import over_seeds
from minir1.model.count import PARTS

Results = dict[str, dict[str, float]]  # seed -> its result.json, as experiments/studies/seeds.py writes them


def r1_zero(results: Results) -> str:
    """The table over seeds, with mean and 95 % t-interval."""
    return markdown_table(seeds.head(results), seeds.rows(list(results.values())))


def headline(results: Results) -> str:
    """One sentence: before and after, and the two controls."""
    values = lambda key: [result[key] for result in results.values()]
    mean = lambda key: f"{sum(values(key)) / len(results):.1%}"
    each = ", ".join(f"{value:.1%}" for value in values("after/pass@1"))
    count = f"the mean of {len(results)} seeds, which end at {each}" if len(results) > 1 else "one seed"
    text = "**Reinforcement learning with rule rewards alone: "
    text += f"{mean('before/pass@1')} → {over_seeds(values('after/pass@1'))} of problems never seen are solved** "
    text += f"(pass@1, {count}); forced to answer without thinking, the same weights solve {mean('forced/pass@1')}"
    if all("nothink/pass@1" in result for result in results.values()):
        text += f", and a base trained in the same way to answer without thinking solves {mean('nothink/pass@1')}"
    return f"{text}."


def profile(figures: dict[str, float]) -> str:
    """Tokens a second of the three kinds of work, and the most expensive operators of two of them."""
    names = [n for n in ("rollout", "update", "pretrain") if f"{n}/seconds" in figures]
    rows = [[name, f"{figures[f'{name}/seconds']:.2f}", f"{figures[f'{name}/tok_s']:,.0f}"] for name in names]
    lines = [markdown_table(["", "seconds", "tokens/s"], rows)]
    for name in ("rollout", "update"):
        shares = [(key, v) for key, v in figures.items() if key.startswith(f"{name}/") and "::" in key]
        text = ", ".join(f"`{key.split('::')[1]}` {share:.0%}" for key, share in shares[:6])
        lines += ["", f"The most expensive operators of the {name}: {text}."]
    return "\n".join(lines)


def peers(figures: dict[str, float]) -> str:
    """Seconds of minir1 and of its peers at equal work, and their ratio."""
    rows = []
    for case, name in (key.split("/")[:2] for key in figures if key.endswith("/ratio")):
        ours, theirs = (f"{figures[f'{case}/{which}/seconds']:.3g}" for which in ("ours", name))
        rows.append([case, name, ours, theirs, f"{figures[f'{case}/{name}/ratio']:.2f}"])
    return markdown_table(["", "against", "ours, s", "theirs, s", "theirs / ours"], rows, words=2)


def floors(figures: dict[str, float]) -> str:
    """Milliseconds of each part of a step, its floor, and their ratio."""
    rows = []
    for name in (key.removesuffix("/floor") for key in figures if key.endswith("/floor")):
        took, least = (figures[f"{name}/{what}"] for what in ("seconds", "floor"))
        label = f"decode step, rows: {name.split()[1]}" if name.startswith("decode") else name
        rows.append([label, f"{1000 * took:,.1f}", f"{1000 * least:,.1f}", f"{took / least:.1f}"])
    return markdown_table(["", "ms", "floor, ms", "times the floor"], rows)


def demo(result: dict[str, float]) -> str:
    """One sentence: accuracy, time and memory of a demonstration."""
    text = f"Seed {result['seed']}: {result['before/pass@1']:.1%} → {result['after/pass@1']:.1%}"
    return f"{text} in {result['seconds/total']:.0f} s with {result['memory/peak_gib']:.1f} GiB."


def count_parts(figures: dict[str, dict[str, float]]) -> str:
    """DeepSeek-V3 by part: parameters, active ones, and their share."""
    one, rows = figures["deepseek-v3"], []
    for part, (label, _) in PARTS.items():
        if part != "mtp":
            total, active = one[f"total/{part}"], one[f"active/{part}"]
            shares = f"{total / one['total']:.2%}", f"{active / one['active']:.2%}"
            rows.append([label, f"{total:,}", shares[0], f"{active:,}", shares[1]])
    rows.append(["**sum**", f"**{one['total']:,}**", "", f"**{one['active']:,}**", ""])
    rows.append(["sum with the input embedding", "", "", f"**{one['active_with_embedding']:,}**", ""])
    rows.append([f"{PARTS['mtp'][0]}, on top", f"{one['total/mtp']:,}", "", f"{one['active/mtp']:,}", ""])
    return markdown_table(["", "total", "share", "active per token", "share"], rows)


def count(figures: dict[str, dict[str, float]]) -> str:
    """One row per model: parameters, cache and operations."""
    head = ["", "total", "active", "with embedding", "cache, numbers per token and layer"]
    rows = []
    for name, one in figures.items():
        cells = [name, *(human(one[key]) for key in ("total", "active", "active_with_embedding"))]
        cells += [f"{one['cache/token_layer']:,}", f"{one['cache/token']:,.0f}"]
        rows.append(cells + [human(one[f"flops/{kind}"], "FLOP") for kind in ("train", "decode")])
    return markdown_table([*head, "cache, bytes per token (bf16)", "training", "decoding"], rows)


def long_context(results: Results) -> str:
    """Accuracy within the trained window, beyond it and at the longest texts, per variant: mean and interval."""
    longest = max(int(key.split("/")[1]) for key in next(iter(results.values())) if re.fullmatch(r"none/\d+/0", key))

    def at_longest(result: dict[str, float], name: str) -> float:
        cells = [share for key, share in result.items() if key.startswith(f"{name}/{longest}/")]
        return sum(cells) / len(cells)

    rows = []
    for name, title in VARIANTS.items():
        sides = [[result[f"{name}/{side}"] for result in results.values()] for side in ("inside", "outside")]
        sides.append([at_longest(result, name) for result in results.values()])
        rows.append([title, *map(over_seeds, sides)])
    return markdown_table(["", "within the window", "beyond it", f"{longest} tokens"], rows)


def prefill(figures: dict[str, float]) -> str:
    """Processor time and peak memory by length of the prompt, in chunks and in one call."""
    heads = [f"{way}: {head}" for way in ("chunks", "one call") for head in ("seconds of the CPU", "peak GiB")]
    rows = []
    for length in (int(key.split("/")[1]) for key in figures if re.fullmatch(r"chunks/\d+/seconds", key)):
        cells = [f"{length:,}", f"{figures[f'cache/{length}/gib']:.3f}"]
        for way in ("chunks", "one_call"):
            measured = f"{way}/{length}/peak_gib" in figures
            cells.append(f"{figures[f'{way}/{length}/cpu_seconds']:.1f}" if measured else "-")
            cells.append(f"{figures[f'{way}/{length}/peak_gib']:.2f}" if measured else "-")
        rows.append(cells)
    return markdown_table(["tokens", "cache, GiB", *heads], rows, words=0)


def speculative(figures: dict[str, float]) -> str:
    """Accepted drafts, tokens per pass and speed, by depth, rows and temperature."""
    rows = []
    for case in dict.fromkeys(key.rsplit("/", 1)[0] for key in figures if "/" in key):
        depth, count, temperature = (part.split("=")[1] for part in case.split("/"))
        rates = ", ".join(f"{figures[f'{case}/accepted_{k}']:.1%}" for k in range(1, int(depth) + 1))
        plain, fast = figures[f"{case}/generate_tok_s"], figures[f"{case}/speculate_tok_s"]
        cells = [depth, count, temperature, rates, f"{figures[f'{case}/tokens_a_pass']:.2f}", f"{plain:,.0f}"]
        rows.append([*cells, f"{fast:,.0f}", f"{fast / plain:.2f} times"])
    head = ["modules", "rows at once", "temperature", "accepted", "tokens per pass", "tokens/s", "with drafts", ""]
    return markdown_table(head, rows, words=0)


def routed(results: dict) -> str:
    """Per sampler and number of updates: tokens sent to other experts, and the ratios with and without replay."""
    return markdown_table(routes.COLUMNS, routes.rows(results))


def reliability(results: Results) -> str:
    """The calibration of the first seed's reward model."""
    first = next(iter(results.values()))
    figures = {key.removeprefix("reward/"): value for key, value in first.items()}
    return markdown_table(reward_model.BINS, reward_model.bin_rows(figures))


def kernels_cpu(figures: dict[str, float]) -> str:
    """Log-prob and KL in chunks of tokens against the naive way: time, peak memory, errors against fp64."""
    lines = []
    for name, title in (("", "log-prob and entropy"), ("kl/", "forward KL")):
        for key in figures:
            if (way := re.fullmatch(rf"{name}(naive|torch/(\d+))/seconds", key)) and "small" not in key:
                prefix = key.removesuffix("/seconds")
                label = f"{title}, chunks of {way[2]} MiB" if way[2] else f"{title}, naive"
                forms = {"seconds": ".2f", "time_ratio": ".2f", "peak_mib": ".0f", "memory_ratio": ".2f"}
                lines.append([label, *(f"{figures[f'{prefix}/{what}']:{form}}" for what, form in forms.items())])
    text = markdown_table(["N=1,024, D=512, V=32,768", "seconds", "of naive", "peak MiB", "of naive"], lines)
    shapes = [match[1] for key in figures if (match := re.fullmatch(r"small/([\dx]+)/torch/time_ratio", key))]
    lines = [
        [title, *(f"{figures[f'small/{name}{shape}/torch/time_ratio']:.2f}" for shape in shapes)]
        for name, title in (("", "log-prob and entropy"), ("kl/", "forward KL"))
    ]
    head = ["N × D × V: time of naive", *(shape.replace("x", " × ") for shape in shapes)]
    text += "\n\n" + markdown_table(head, lines)
    ours, torchs = (figures[f"accuracy/{way}/logp"] for way in ("torch", "naive"))
    text += f"\n\nLargest error of a log-prob against fp64: {ours:.1e}, torch's log_softmax {torchs:.1e};"
    dh, dw = (figures[f"accuracy/torch/{key}"] for key in ("dh", "dw"))
    return f"{text} relative error of the gradients: {dh:.1e} for h and {dw:.1e} for w."


def kernel_resources(figures: dict) -> str:
    """Registers, spills, shared memory and tensor-core instructions of each kernel, on two architectures."""
    made: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    for key, needs in figures["kernels"].items():
        *case, kernel, arch = key.split("/")
        if "bf16" in case and kernel not in ("stat", "merge", "finish"):
            made.setdefault((" ".join(x for x in case if x != "bf16"), kernel), {})[arch] = needs
    cells = lambda x: [f"{n:.0f}" for n in (x["registers"], x["spills"], x["shared"] / 1024, x["hgmma"] + x["hmma"])]
    lines = [[case, kernel, *cells(on["sm_90"]), *cells(on["sm_80"])] for (case, kernel), on in made.items()]
    columns = ["registers", "spilled", "shared KiB", "tensor-core instructions"]
    head = ["operation, heads (qk, v)", "kernel", *(f"{arch}: {x}" for arch in ("sm_90", "sm_80") for x in columns)]
    small = [x["shared"] for key, x in figures["kernels"].items() if key.endswith(("sm_86", "sm_89"))]
    inner = {" ".join(key.split("/")[:-1]) for key, x in figures["kernels"].items() if x["inner"]}
    return (f"{markdown_table(head, lines)}\n\nTriton {figures['triton']}. On sm_86 and sm_89 the largest asks for "
            f"{max(small) / 1024:.0f} KiB. Kernels that load spilled registers in an inner loop: "
            f"{', '.join(sorted(inner)) or 'none'}.")


BLOCKS = {  # name -> file under docs/results (None: made from the code), function
    "files": (None, file_map.page),
    "r1_zero": ("r1_zero.json", r1_zero),
    "headline": ("r1_zero.json", headline),
    "wide": ("wide.json", r1_zero),
    "four": ("four.json", r1_zero),
    "demo": ("demo.json", demo),
    "r1": ("r1.json", lambda x: markdown_table(r1_seeds.head(), r1_seeds.rows(list(x.values())))),
    "r1_finding": ("r1.json", lambda x: r1_seeds.finding(list(x.values()))),
    "r1_seconds": ("r1_run.json", r1_seeds.cost),
    "profile": ("profile.json", profile),
    "profile_dense": ("profile_dense.json", profile),
    "peers": ("peers.json", peers),
    "floors": ("profile.json", floors),
    "floors_dense": ("profile_dense.json", floors),
    "speculative": ("speculative.json", speculative),
    "serving": ("serving.json", serving.page),
    "long_context": ("long_context.json", long_context),
    "chat": ("chat.json", bench_chat.page),
    "prefill": ("prefill.json", prefill),
    "prefill_full": ("prefill_full.json", prefill),
    "count_parts": ("count.json", count_parts),
    "count": ("count.json", count),
    "balance": ("balance.json", lambda results: markdown_table(balance.COLUMNS, balance.rows(results))),
    "kernel_resources": ("kernel_resources.json", kernel_resources),
    "kernels_cpu": ("bench_kernels_cpu.json", kernels_cpu),
    "balance_tuning": ("balance.json", lambda results: markdown_table(balance.TUNING, balance.tuning_rows(results))),
    "preference": ("preference.json", lambda x: markdown_table(preferences.head(x), preferences.rows(x))),
    "reliability": ("preference.json", reliability),
    "algorithms": ("algorithms.json", algorithms.page_result),
    "algorithms_sweep": ("algorithms.json", algorithms.page_sweep),
    "kl": ("kl.json", kl.page),
    "reduction": ("reduction.json", reduction.page),
    "curriculum": ("curriculum.json", curriculum.page),
    "verifiers": ("verifiers.json", verifiers.page),
    "group_size": ("group_size.json", group_size.page),
    "hybrid": ("hybrid.json", hybrid.page),
    "self_check": ("self_check.json", self_check.page),
    "distill_ways": ("distill_ways.json", distill_ways.page),
    "distill_vs_rl": ("distill_vs_rl.json", distill_vs_rl.page),
    "self_verify": ("thinking.json", thinking.page_verify),
    "budget": ("thinking.json", thinking.page_budget),
    "overoptimization": ("overoptimization.json", overoptimization.page),
    "routes": ("routes.json", routed),
    "estimators": ("estimators.json", estimators.page),
    "estimators_problems": ("estimators.json", estimators.page_problems),
    "estimators_kl": ("estimators.json", estimators.page_kl),
    "estimators_moved": ("estimators.json", estimators.page_moved),
    "tokenizer": ("tokenizer.json", train_tokenizer.page),
    "own_text": ("own_text.json", pretrain_text.page),
    "estimators_distill": ("estimators.json", estimators.page_distill),
    "departures": (None, departures.page),
    "gallery": ("gallery.json", gallery.page),
    "gallery_healthy": ("gallery.json", gallery.page_healthy),
    "gallery_stored": ("gallery.json", gallery.page_stored),
    "gallery_surplus": ("gallery.json", gallery.page_surplus),
    "gallery_seconds": ("gallery.json", gallery.page_seconds),
    "refused": (None, scaling.page_refused),
    "too_large": (None, scaling.page_too_large),
    "scales": (None, scaling.page_scales),
    "published_v3": (None, scaling.page_v3),
    "published_runs": (None, scaling.page_runs),
    "long_tail": ("long_tail.json", long_tail.page),
} | {f"diff_{name}": (None, partial(variants.page, name)) for name in variants.COPIES}
