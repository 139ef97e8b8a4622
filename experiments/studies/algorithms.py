"""Which policy-gradient objective solves most problems, with equal numbers of answers and steps?

    python -m experiments.studies.algorithms --checkpoint runs/base/checkpoint --jobs 2

Eleven objectives are trained from one base. First a sweep chooses each method's learning rate: the same three rates for
all, one seed, half of the steps, pass@1 on the validation split. Then each method runs at its rate with fresh seeds and
all steps, and its last checkpoint is measured on the test split. All other options have the defaults of the scripts.

Equal cost means equal answers per batch and equal steps, with two exceptions: DAPO samples more, to refill its batch
until every group is mixed, and PPO trains only its value in the first steps. All sampled tokens are counted, and the
learning curves are drawn over them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.studies import comparison_figures
from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import START, Cell, Config, Method, cells_of, complete, end, load
from experiments.studies.comparison_tables import Results, listed, of
from minir1 import cli
from minir1.log import markdown_table, table

METHODS = {
    "grpo": Method("GRPO", "r1_zero"),
    "reinforce": Method("REINFORCE", "reinforce"),
    "rloo": Method("RLOO", "variants.rloo"),
    "dr_grpo": Method("Dr. GRPO", "variants.dr_grpo"),
    "gspo": Method("GSPO", "variants.gspo"),
    "sequence_grpo": Method("GRPO (seq.)", "variants.sequence_grpo"),
    "cispo": Method("CISPO", "variants.cispo"),
    "reinforce_pp": Method("REINFORCE++", "variants.reinforce_pp"),
    "dapo": Method("DAPO", "variants.dapo"),
    "ppo": Method("PPO, λ = 1", "ppo", {"gae-lambda": 1.0}),
    "ppo_gae": Method("PPO, λ = 0.95", "ppo", {"gae-lambda": 0.95}),
}
FACTORS = (1 / 3, 1, 3)  # of Config.learning_rate
SWEEP_SEED = 1000  # not one of the seeds of the comparison
DEFAULT = Config(
    steps=24,
    eval_every=12,
    test_answers=4,
    out=Path("runs/algorithms"),
    results=Path("docs/results/algorithms.json"),
    figure=Path("docs/results/algorithms.png"),
)


def rates(config: Config) -> list[float]:
    """The learning rates of the sweep, in ascending order."""
    return [float(f"{factor * config.learning_rate:.3g}") for factor in FACTORS]


def sweep(config: Config) -> list[Cell]:
    """Every method at every rate, one seed, half of the steps, on the validation split."""
    cells, steps = [], max(1, config.steps // 2)
    for name, method in METHODS.items():
        for rate in rates(config):
            options = method.options | {"learning-rate": rate}
            cells.append(Cell(f"sweep/{name}/{rate:g}", method.script, options, steps, SWEEP_SEED, "validation"))
    return cells


def chosen(results: Results, config: Config = DEFAULT) -> dict[str, float]:
    """method -> the rate with the best pass@1, of equals the smaller, for each method whose sweep is done."""
    best = {}
    for name in METHODS:
        runs = {rate: results.get(f"sweep/{name}/{rate:g}") for rate in rates(config)}
        if all(runs.values()):
            best[name] = max(runs, key=lambda rate: runs[rate]["pass@1"])
    return best


def trained(results: Results, config: Config) -> list[Cell]:
    """The cells of the base and of the methods whose rate is chosen, seed by seed."""
    methods = {}
    for name, rate in chosen(results, config).items():
        methods[name] = replace(METHODS[name], options=METHODS[name].options | {"learning-rate": rate})
    return cells_of(methods, config)


# ---- the blocks of docs/algorithms.md ----------------------------------------------------------


def labelled(results: Results, config: Config = DEFAULT) -> dict[str, Method]:
    """The methods with the chosen rate in their labels."""
    known = chosen(results, config)
    return {
        name: replace(method, label=f"{method.label}, lr {known[name]:g}" if name in known else method.label)
        for name, method in METHODS.items()
    }


def sweep_rows(results: Results, config: Config = DEFAULT) -> list[list[str]]:
    """A row per method: pass@1 on the validation split at each rate, the chosen one in bold."""
    known, lines = chosen(results, config), []
    for name, method in METHODS.items():
        line = [method.label]
        for rate in rates(config):
            result = results.get(f"sweep/{name}/{rate:g}")
            text = f"{result['pass@1']:.1%}" if result else "pending"
            line.append(f"**{text}**" if known.get(name) == rate else text)
        lines.append(line)
    return lines


def edges(results: Results) -> str:
    """A sentence: for which methods the best rate is the smallest or the largest of the grid."""
    known, tried = chosen(results), rates(DEFAULT)
    low, high = ([METHODS[n].label for n, rate in known.items() if rate == edge] for edge in (tried[0], tried[-1]))
    if not low and not high:
        return "No method's best rate lies at an edge of the grid." if known else ""
    text = f"At the lower edge of the grid, so that a smaller rate might be better still: {listed(low)}. "
    return text + f"At the upper edge: {listed(high)}."


def refill(results: Results) -> str:
    """A sentence: tokens sampled by DAPO and PPO relative to GRPO with the same seeds."""
    ratios = []
    for name in ("dapo", "ppo", "ppo_gae"):
        one, other = of(results, name), of(results, "grpo")
        both = one.keys() & other.keys()
        if both:
            times = sum(one[s]["tokens/sampled"] for s in both) / sum(other[s]["tokens/sampled"] for s in both)
            ratios.append(f"{METHODS[name].label} {times:.2f} times")
    return f"Tokens sampled in training, as a multiple of GRPO's: {listed(ratios)}." if ratios else ""


def page_sweep(results: Results) -> str:
    """The block of the sweep."""
    head = ("", *(f"{rate:g}" for rate in rates(DEFAULT)))
    return f"{markdown_table(head, sweep_rows(results))}\n\n{edges(results)}".rstrip()


def page_result(results: Results) -> str:
    """The block of the comparison, see `comparison_tables.page`."""
    more = {"names": names(), "note": refill(results), "labelled": labelled(results)}
    return tables.page(results, METHODS, "grpo", DEFAULT, "studies.algorithms", **more)


def names() -> list[str]:
    """The name of every cell, in the order in which they run."""
    return [cell.name for cell in sweep(DEFAULT) + cells_of(METHODS, DEFAULT)]


def draw(config: Config) -> None:
    """The figure of the results so far."""
    results = load(config.results)
    drawn = tables.parts(results, METHODS)
    if drawn["ends"] and START in results:
        comparison_figures.algorithms(tables.start(results), **drawn, path=config.figure)


def main(config: Config) -> None:
    """Sweep, choose the rates, compare, print; writes each result as it comes. SystemExit if a cell fails."""
    failed = complete(sweep(config), config, later=len(METHODS) * len(config.seeds) * config.steps)
    failed |= complete(trained(load(config.results), config), config, after=draw)
    results = load(config.results)
    head = ["", *(f"{rate:g}" for rate in rates(config))]
    table("learning rates: pass@1 on the validation split", head, sweep_rows(results, config))
    tables.show("test split", results, labelled(results, config), "grpo")
    end(failed, config)


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
