"""A task for the models of talker.py: the right answer has a greeting in it."""

from minir1.tasks import Problem, Verdict


def problems(split, data=None):
    return [Problem("make 11 from 3", "你好")]


def verify(problem, text):
    return Verdict("right" if problem.reference in text else "wrong", {})
