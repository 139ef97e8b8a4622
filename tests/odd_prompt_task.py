"""Countdown with one training prompt, the second of 400, that a word-level tokenizer cannot encode."""

from dataclasses import replace

from minir1.tasks import countdown

SPLITS, verify = countdown.SPLITS, countdown.verify


def problems(split, data):
    first, second, *more = countdown.problems(split)[:400]
    return [first, replace(second, prompt="make é from 1,2") if split == "train" else second, *more]
