"""What a head on the states knows of an answer, and what that is good for. A part of experiments/self_verify.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from minir1 import tasks
from minir1.judge import Answer, majority_vote
from minir1.metrics import auc, auc_within, pass_at_k, share_interval

SHOWN = 0.05  # share of the answers that must be longer for a position to be measured


class Trace(NamedTuple):
    """One answer of n tokens: the states after each, and what is to be known."""

    states: Tensor  # fp32 [n, D]
    logp: Tensor  # fp32 [n], of each token
    answer: Answer
    tries: list[tuple[int, int, bool]]  # first and last token of each try, before its verdict; whether it is a solution


def by_position(e: list[np.ndarray], grid: list[list[Trace]]) -> dict[str, float]:
    """AUC of the head and of the baselines after n tokens, after/N/KEY, and at the end, end/KEY.

    e: σ of the first output after each token of each answer, in the order of the grid. Keys: auc, within (a problem),
    logp, running (share of the answers), and the squared error of the head; at the end also short. What has no pairs of
    both kinds is left out.
    """
    flat = [(p, trace) for p, row in enumerate(grid) for trace in row]

    def at(places: list[int], chosen: list[int]) -> dict[str, float]:
        right = np.array([flat[i][1].answer.right for i in chosen])
        known = np.array([e[i][place] for i, place in zip(chosen, places)])
        logp = [flat[i][1].logp[: place + 1].mean().item() for i, place in zip(chosen, places)]
        values = {"auc": auc(known, right), "within": auc_within(known, right, [flat[i][0] for i in chosen])}
        values |= {"logp": auc(logp, right), "running": len(chosen) / len(flat)}
        return values | {"squared_error": float(np.square(known - right).mean())}

    lengths, right = ([f(trace) for _, trace in flat] for f in (lambda t: len(t.states), lambda t: t.answer.right))
    values: dict[str, float] = {}
    for n in (2**power for power in range(32)):
        chosen = [i for i, length in enumerate(lengths) if length > n]
        if len(chosen) < max(1, SHOWN * len(flat)):
            break
        values |= {f"after/{n}/{key}": value for key, value in at([n - 1] * len(chosen), chosen).items()}
    ends = at([length - 1 for length in lengths], list(range(len(flat))))
    values |= {f"end/{key}": value for key, value in ends.items()}
    values["end/short"] = auc([-length for length in lengths], right)
    values["squared_error_of_the_mean"] = float(np.mean(right) * (1 - np.mean(right)))
    return {key: value for key, value in values.items() if np.isfinite(value)}


def of_tries(e: list[np.ndarray], grid: list[list[Trace]]) -> dict[str, float]:
    """AUC of the second output after each quarter of a try; nothing without tries of both kinds."""
    tries = [(x, *t) for x, trace in zip(e, (t for row in grid for t in row)) for t in trace.tries]
    solved = [t[-1] for t in tries]
    if len(set(solved)) < 2:
        return {}
    values = {"try/count": len(tries), "try/solutions": float(np.mean(solved))}
    for quarter in range(5):
        known = [x[first + round(quarter * (last - first) / 4)] for x, first, last, _ in tries]
        values[f"try/{quarter}/auc"] = auc(known, solved)
    return values


def best_of(
    task: tasks.Task, problems: Sequence[tasks.Problem], e: list[list[np.ndarray]], grid: list[list[Trace]], n: int
) -> dict[str, float]:
    """Accuracy of one answer among k, k = 1, 2, 4 … up to n, by the head, by majority, at random, and of any.

    Each is a mean over the n // k parts of a problem's answers, of any over all sets of k.
    """
    rows = [[trace.answer for trace in row] for row in grid]
    ends = [[x[-1] for x in known] for known in e]
    count = np.array([sum(a.right for a in row) for row in rows])
    values: dict[str, float] = {"random": float(count.mean() / n)}
    k = 1
    while k <= n:
        parts = range(0, n - k + 1, k)
        best = lambda row, known: [row[i + int(np.argmax(known[i : i + k]))].right for i in parts]
        head = np.array([np.mean(best(row, known)) for row, known in zip(rows, ends)])
        values |= dict(zip((f"head@{k}", f"head@{k}_low", f"head@{k}_high"), share_interval(head)))
        votes = [majority_vote(task, p, row, k) for p, row in zip(problems, rows)]
        values |= dict(zip((f"maj@{k}", f"maj@{k}_low", f"maj@{k}_high"), share_interval(votes)))
        values[f"pass@{k}"] = float(pass_at_k(n, count, k).mean())
        values[f"tokens@{k}"] = k * float(np.mean([a.tokens for row in rows for a in row]))
        k *= 2
    return values


def restart(e: list[list[np.ndarray]], grid: list[list[Trace]], threshold: float) -> tuple[float, float]:
    """(accuracy, tokens) of stopping an answer at its first e below the threshold and beginning the next.

    The last answer is never stopped, and none in the first tenth of the usual length. Means over the n orders of a
    problem's answers that begin with each of them.
    """
    patience = int(np.mean([len(trace.states) for row in grid for trace in row]) / 10)
    right, tokens = [], []
    for known, row in zip(e, grid):
        below = [np.flatnonzero(x[patience:] < threshold) for x in known]
        stops = [patience + int(places[0]) + 1 if len(places) else None for places in below]
        for first in range(len(row)):
            order, spent = [(first + i) % len(row) for i in range(len(row))], 0
            for g in order[:-1]:
                if stops[g] is None:
                    break
                spent += stops[g]
            else:
                g = order[-1]
            right.append(row[g].answer.right)
            tokens.append(spent + len(row[g].states))
    return float(np.mean(right)), float(np.mean(tokens))


def positions(values: dict[str, float]) -> list[int]:
    """The numbers of tokens after which the head was measured."""
    return sorted(int(key.split("/")[1]) for key in values if key.startswith("after/") and key.endswith("/auc"))
