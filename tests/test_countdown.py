import hashlib
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import pytest
from clock import quickest
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1 import rewards
from minir1.tasks import Problem, countdown, load, spread
from minir1.tasks.countdown import (
    SPLITS,
    all_problems,
    attempts,
    baselines,
    behaviour,
    difficulty,
    evaluate_expression,
    problems,
    split_of,
    verify,
)
from minir1.tasks.countdown_search import (
    LEVELS,
    Level,
    expected_tries,
    expression,
    parse,
    random_search,
    random_search_distinct,
    solutions,
    tries,
    try_text,
    value_of,
)

P = Problem("make 24 from 11,3,3", "(11-3)*3")


def said(answer: str, thinking: str = "hm") -> str:
    return f"<think>{thinking}</think><answer>{answer}</answer>"


# Verification

CHEATS = {
    "reused number": "(11-3)*3*3-48",
    "reused number, right value": "3+3+3+3+3+3+3+3",
    "missing number": "3*8",
    "missing number, cancelled": "11+11+3-1",
    "extra number": "(11-3)*3*1",
    "extra zero": "(11-3)*3+0",
    "wrong value": "(11-3)+3",
    "precedence forgotten": "11-3*3",
    "precedence forgotten, other order": "3*11-3",
    "negative value": "3*(3-11)",
    "the target": "24",
    "target = target": "24=24",
    "equation": "(11-3)*3=24",
    "steps": "11-3=8,8*3=24",
    "comparison": "(11-3)*3==24",
    "list of numbers": "11,3,3",
    "two expressions": "(11-3)*3,(11-3)*3",
    "two lines": "(11-3)*3\n(11-3)*3",
    "or": "(11-3)*3 or 24",
    "prose": "the answer is (11-3)*3",
    "boxed": "\\boxed{(11-3)*3}",
    "full-width digits": "(11-3)*３",
    "arabic digits": "(١١-٣)*٣",
    "superscript": "(11-3)*³",
    "unicode minus": "(11−3)*3",
    "en dash": "(11–3)*3",
    "times sign": "(11-3)×3",
    "middle dot": "(11-3)·3",
    "full-width parentheses": "（11-3）*3",
    "zero-width space": "(11-3)*\u200b3",
    "no-break space within": "(11-3)\u00a0*3",
    "NUL": "(11-3)*3\0",
    "square brackets": "[11-3]*3",
    "import": "__import__('os').system('true') or 24",
    "call": "int('24')",
    "name": "target",
    "lambda": "(lambda: 24)()",
    "comment": "24 # (11-3)*3",
    "block comment": "(11-3)*3 /* 24 */",
    "string": "'(11-3)*3'",
    "power": "(11-3)**3",
    "power, right numbers": "3**3-11",
    "floor division": "(11-3)//3",
    "division": "(11-3)/3",
    "modulo": "(11-3)%3",
    "bitwise": "11^3^3",
    "shift": "3<<3",
    "conditional": "24 if 11-3*3 else 0",
    "walrus": "(x:=11-3)*3",
    "leading zero": "(11-03)*3",
    "exponent": "(1e1-3)*3",
    "float": "(11.0-3)*3",
    "point": "(11-3)*3.",
    "hexadecimal": "(0xb-3)*3",
    "underscore": "(1_1-3)*3",
    "complex": "(11-3)*3j",
    "negative sign": "-(3-11)*3",
    "negative number": "(11+-3)*3",
    "positive sign": "+(11-3)*3",
    "concatenation": "(1 1-3)*3",
    "adjacent": "(11-3)3",
    "implicit multiplication": "3(11-3)",
    "implicit multiplication of parentheses": "(11-3)(3)",
    "unclosed": "((11-3)*3",
    "closed too often": "(11-3)*3)",
    "empty parentheses": "()(11-3)*3",
    "operator last": "(11-3)*3+",
    "operator alone": "*",
    "nothing": "",
    "blank": " \n\t",
    "deep": "(" * 90 + "11-3" + ")" * 90 + "*3",
    "very deep": "(" * 100_000 + "11-3" + ")" * 100_000 + "*3",
    "long": "(11-3)*3" + " " * 200 + "+0",
    "huge": "11-3*" * 20_000 + "3",
    "huge number": "9" * 100_000,
    "answer tag within": "<answer>(11-3)*3",
    "closing tag within": "(11-3)*3</answer></answer>",
    "think within": "<think>x</think>(11-3)*3",
    "other tag within": "<b>(11-3)*3</b>",
}
GOOD = "<answer>(11-3)*3</answer>"
CHEATING_TEXTS = {
    "answer twice": f"<think>x</think>{GOOD}{GOOD}",
    "answer and a wrong one": f"<think>x</think><answer>24</answer>{GOOD}",
    "answer in think": f"<think>{GOOD}</think>",
    "answer in think and after": f"<think>{GOOD}</think>{GOOD}",
    "answer in open think": f"<think>x{GOOD}",
    "answer in think opened by the template": f"x{GOOD}</think>",
    "think never opened nor closed": GOOD,
    "truncated": "<think>x</think><answer>(11-3)*3",
    "no tags": "(11-3)*3",
    "upper case tags": "<THINK>x</THINK><ANSWER>(11-3)*3</ANSWER>",
    "tags in the wrong order": "<think>x</think></answer>(11-3)*3<answer>",
    "think after the answer": f"{GOOD}<think>x</think>",
    "full-width tags": "<think>x</think>＜answer＞(11-3)*3＜/answer＞",
    "many answers": "<think>x</think>" + GOOD * 10_000,
    "empty": "",
}
MALFORMED = {
    "text after": f"<think>x</think>{GOOD} I am sure",
    "text before": f"Sure! <think>x</think>{GOOD}",
    "text between": f"<think>x</think>so{GOOD}",
    "empty think": f"<think></think>{GOOD}",
    "blank think": f"<think> \n</think>{GOOD}",
    "two thinks": f"<think>x</think><think>y</think>{GOOD}",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_is_right(name):
    verdict = verify(P, said(CHEATS[name]))
    assert verdict.status == "wrong" and verdict.scores["accuracy"] == 0


@pytest.mark.parametrize("name", CHEATING_TEXTS)
def test_no_cheating_text_is_right(name):
    verdict = verify(P, CHEATING_TEXTS[name])
    assert verdict.status == "wrong" and verdict.scores == {"accuracy": 0.0}
    assert rewards.format_reward(CHEATING_TEXTS[name]) == 0


@pytest.mark.parametrize("name", MALFORMED)
def test_a_right_answer_in_a_malformed_text_is_right_and_gets_no_format_reward(name):
    assert verify(P, MALFORMED[name]).scores == {"accuracy": 1.0}
    assert rewards.format_reward(MALFORMED[name]) == 0


@pytest.mark.parametrize(
    "answer",
    ["(11-3)*3", "3*(11-3)", " ( 11 - 3 ) * 3 ", "\n(11-3)\n*\n3\n", "((11-3)*3)", "(((11)-(3)))*(3)", "(11-3)*(3)"],
)
def test_right_answers(answer):
    verdict = verify(P, said(answer))
    assert verdict.status == "right" and verdict.scores == {"accuracy": 1.0}
    assert rewards.format_reward(said(answer)) == 1


def test_intermediate_values_are_not_restricted():
    assert verify(Problem("make 12 from 1,2,15", ""), said("1-2*2+15")).status == "wrong"
    assert verify(Problem("make 14 from 1,2,15", ""), said("1-2+15")).status == "right"


def test_the_control_without_thinking():
    text = "<think></think><answer>(11-3)*3</answer>"
    assert verify(P, text).scores == {"accuracy": 1.0}
    assert rewards.format_reward(text, allow_empty_think=True) == 1


def test_operators_group_to_the_left_and_times_binds_closer():
    assert evaluate_expression("9-3-2") == (4, [9, 3, 2])
    assert evaluate_expression("2+3*4-5*(1+1)") == (4, [2, 3, 4, 5, 1, 1])


def _tree(rng: random.Random, size: int) -> str:
    if size == 1:
        return str(rng.randint(0, 30))
    left = rng.randint(1, size - 1)
    text = f"{_tree(rng, left)}{rng.choice('+-*')}{_tree(rng, size - left)}"
    return f"({text})" if rng.random() < 0.5 else text


def test_evaluation_agrees_with_python():
    rng = random.Random(0)
    for _ in range(500):
        text = _tree(rng, rng.randint(1, 8))
        assert evaluate_expression(text)[0] == eval(text)  # our own text, in the test only


PIECES = [*rewards.TAGS, *"0123+-*()= ,\n", "11", "3", "yes", "no", "11-3=8,8*3=24 yes\n", "٣"]
pieces = st.lists(st.sampled_from(PIECES))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text().map(said), pieces.map("".join), pieces.map("".join).map(said)))
def test_no_text_raises(text):
    verdict = verify(P, text)
    assert verdict.status in ("right", "wrong")
    assert (verdict.status == "right") == (verdict.scores["accuracy"] == 1)
    assert all(value >= 0 for value in behaviour(P, text).values())


LONG = ["(", "9", " ", "\n", "1 ", "=", ",", "11-3=8,", "11-3=8 ", "11-3=8,8*3=24 yes\n", "yes\n"]
LONG += ["<think>", "</think>", "</answer>"]


@pytest.mark.parametrize("piece", LONG)
def test_long_garbage_is_fast(piece):
    long = piece * (100_000 // len(piece))
    for text in (long, said(long), said("24", long), said("24", long + "!")):
        assert verify(P, text).status == "wrong"
        assert quickest(verify, P, text) + quickest(behaviour, P, text) < 0.25


# Problems and splits

COUNTS = {
    "default": {"train": 758, "validation": 176, "test": 364, "unseen": 159},
    "wide": {"train": 5356, "validation": 1415, "test": 2641, "unseen": 1267},
    "four": {"train": 7526, "validation": 2017, "test": 3802, "unseen": 1751},
}


@pytest.mark.parametrize("level", LEVELS)
def test_counts(level):
    assert Counter(split_of(p) for p in all_problems(level)) == COUNTS[level]


@pytest.mark.parametrize("level", LEVELS)
def test_problems_differ_and_their_references_are_right(level):
    listed = all_problems(level)
    assert len({(tuple(sorted(parse(p)[0])), parse(p)[1]) for p in listed}) == len(listed)
    for p in listed[:: max(1, len(listed) // 1500)]:
        assert p.level == level and p.language == "en"
        assert verify(p, said(p.reference)).status == "right"


@pytest.mark.parametrize("level", LEVELS)
def test_the_splits_partition_the_level_in_order(level):
    parts = {split: problems(split, None, level) for split in SPLITS}
    for split, part in parts.items():
        assert part == [p for p in all_problems(level) if split_of(p) == split]
    assert sum(map(len, parts.values())) == len(all_problems(level))
    with pytest.raises(ValueError, match="'dev'; allowed: train, validation, test, unseen"):
        problems("dev")


DIGESTS = {"default": "152c4f348162fdbe", "wide": "68b7377baeb3e332", "four": "9190e1cbf45dfffe"}


@pytest.mark.parametrize("level", LEVELS)
def test_the_training_problems_never_change(level):
    text = "".join(f"{p.prompt} = {p.reference}\n" for p in load(f"countdown:{level}").problems("train"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[level]


def test_spread_problems_come_from_the_whole_level():
    everything = problems("validation", None, "wide")
    indices = [everything.index(p) for p in spread(everything, 100)]
    assert len(set(indices)) == 100 and indices == sorted(indices) and max(indices) > 0.98 * len(everything)


def test_prompts_are_shuffled():
    orders = [parse(p)[0] for p in all_problems()]
    assert 0.1 < sum(list(n) == sorted(n) for n in orders) / len(orders) < 0.5
    assert 0.1 < sum(list(n) == sorted(n)[::-1] for n in orders) / len(orders) < 0.5


def test_members_of_the_splits_never_change():
    assert all_problems()[0] == Problem("make 10 from 5,1,1", "5*(1+1)", level="default")
    for prompt, name in MEMBERS.items():
        assert split_of(Problem(prompt, "")) == name


MEMBERS = {
    "make 10 from 5,1,1": "test",
    "make 30 from 1,6,6": "train",
    "make 15 from 10,5,10": "validation",
    "make 14 from 7,1,1": "unseen",
    "make 65 from 16,5,3": "train",
    "make 26 from 1,3,6,10": "validation",
}


def test_unseen_numbers_are_in_no_other_split_of_any_level():
    where: dict[tuple[int, ...], set[str]] = {}
    for level in LEVELS:
        for p in all_problems(level):
            where.setdefault(tuple(sorted(parse(p)[0])), set()).add(split_of(p))
    assert all(len(names) == 1 for names in where.values() if "unseen" in names)
    assert sum("unseen" in names for names in where.values()) > 100


def test_the_split_ignores_order_and_level():
    for p in all_problems()[::50]:
        numbers, target = parse(p)
        turned = ",".join(str(n) for n in numbers[::-1])
        assert split_of(Problem(f"make {target} from {turned}", "", level="wide")) == split_of(p)


FOREIGN = ["", "make 24"]
FOREIGN += ["make 24 from ", "make 24 from 1,,2", "make x from 1,2", "make 24 from 1,2 ", "make -1 from 1,2"]


@pytest.mark.parametrize("prompt", FOREIGN)
def test_a_foreign_prompt_is_an_error(prompt):
    with pytest.raises(ValueError, match="countdown prompt"):
        verify(Problem(prompt, ""), said("1"))


def test_an_unknown_level_is_an_error():
    with pytest.raises(ValueError, match="default, wide, four"):
        all_problems("hard")


# Tries


def test_tries_by_hand():
    assert [try_text(t) for t in tries((11, 3, 3))] == [
        "11+3=14,14+3=17",
        "11+3=14,14-3=11",
        "11-3=8,8+3=11",
        "11-3=8,8-3=5",
        "11-3=8,8*3=24",
        "3+3=6,11+6=17",
        "3+3=6,11-6=5",
        "3*3=9,11+9=20",
        "3*3=9,11-9=2",
    ]  # 11*3 and 14*3 pass 30, 3-3 is 0
    assert tries((11, 3, 3), LEVELS["default"]) == tries((11, 3, 3), "default")
    assert len(tries((11, 3, 3), replace(Level(), operators="+"))) == 2


def _brute(numbers: tuple[int, ...], level: Level) -> set[str]:
    """All try texts, from every choice of pairs and operators, checked afterwards."""
    texts = set()
    n = len(numbers)
    pairs = [list(combinations(range(size), 2)) for size in range(n, 1, -1)]
    for choice, ops in product(product(*pairs), product("+-*", repeat=n - 1)):
        hand, text = list(numbers), []
        for (i, j), op in zip(choice, ops):
            b, a = sorted((hand[i], hand[j]))
            c = {"+": a + b, "-": a - b, "*": a * b}[op]
            hand = [v for k, v in enumerate(hand) if k not in (i, j)] + [c]
            text.append((f"{a}{op}{b}={c}", c))
        if all(1 <= c <= level.value for _, c in text):
            texts.add(",".join(step for step, _ in text))
    return texts


HANDS = [(11, 3, 3), (1, 1, 1), (12, 12, 12), (2, 7, 5), (5, 4, 3, 2), (1, 1, 2, 2), (12, 9, 11, 10)]


@pytest.mark.parametrize("numbers", HANDS)
def test_tries_against_brute_force(numbers):
    level = LEVELS["default"]
    texts = [try_text(t) for t in tries(numbers, level)]
    assert len(set(texts)) == len(texts) and set(texts) == _brute(numbers, level)


@pytest.mark.parametrize("level, stride", [("default", 1), ("wide", 40), ("four", 150)])
def test_every_expression_of_every_try_has_its_value_and_uses_the_numbers(level, stride):
    for numbers in sorted({parse(p)[0] for p in all_problems(level)[::stride]}):
        for t in tries(numbers, level):
            value, used = evaluate_expression(expression(t))
            assert value == value_of(t) and sorted(used) == sorted(numbers)
            assert all(a >= b and 1 <= c <= LEVELS[level].value for a, _, b, c in t)


def test_expressions_by_hand():
    assert expression(((11, "-", 3, 8), (8, "*", 3, 24))) == "(11-3)*3"
    assert expression(((5, "+", 4, 9), (9, "-", 3, 6), (6, "*", 2, 12))) == "((5+4)-3)*2"
    assert expression(((5, "+", 4, 9), (3, "-", 2, 1), (9, "*", 1, 9))) == "(5+4)*(3-2)"
    assert expression(((2, "+", 2, 4), (4, "+", 4, 8))) == "(2+2)+4"


# Search


def test_difficulty_and_search_by_hand():
    assert [try_text(t) for t in solutions(P)] == ["11-3=8,8*3=24"]
    assert expected_tries(P) == 9
    assert random_search(P, 0) == 0 and random_search(P, 1) == pytest.approx(1 / 9)
    assert random_search(P, 2) == pytest.approx(17 / 81)
    assert random_search_distinct(P, 4) == random_search_distinct(P, 4.7) == pytest.approx(4 / 9)
    assert random_search_distinct(P, 9) == random_search_distinct(P, 100) == 1
    for search in (random_search, random_search_distinct):
        with pytest.raises(ValueError, match="k = -1"):
            search(P, -1)


@pytest.mark.parametrize("p", all_problems()[7::300], ids=lambda p: p.prompt)
def test_search_against_enumeration(p):
    numbers, target = parse(p)
    hits = [value_of(t) == target for t in tries(numbers, p.level)]
    assert expected_tries(p) == pytest.approx(len(hits) / sum(hits))
    for k in (1, 2, 3):
        drawn = list(product(hits, repeat=k))
        assert random_search(p, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))
        drawn = list(combinations(hits, k))
        assert random_search_distinct(p, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))


GROUPS = {"easy": (0, 6), "middle": (6, 12), "hard": (12, float("inf"))}


def test_groups_of_difficulty():
    needed = {name: [expected_tries(p) for p in all_problems() if difficulty(p) == name] for name in GROUPS}
    assert sum(map(len, needed.values())) == len(all_problems()) and all(needed.values())
    for name, (low, high) in GROUPS.items():
        assert all(low <= n < high for n in needed[name])


def test_baselines_search_as_long_as_the_text():
    lines = "11+3=14,14+3=17 no\n11-3=8,8-3=5 no\n"
    for thinking, k in (("", 1), (lines, 2), (lines * 2, 4)):
        want = {"search": random_search(P, k), "search_without_repeats": random_search_distinct(P, k)}
        assert baselines(P, said("24", thinking)) == want


# Behaviour

ZERO = dict(tries=0, steps=0, arithmetic_errors=0, illegal=0, repeats=0, said_yes=False, false_yes=0, false_no=0)


@pytest.mark.parametrize(
    "thinking, counts",
    [
        ("", {}),
        ("hm\n11-3=8\nyes\n11-3=8,8*3=24\n11-3=8,8*3=24 maybe\n", {}),
        ("11+3=14,14+3=17 no\n11-3=8,8*3=24 yes\n", dict(tries=2, steps=4, said_yes=True)),
        ("11-3=8,3*8=24 yes", dict(tries=1, steps=2, said_yes=True)),
        ("11-3=8,8*3=24 yes\n11+3=14,14+3=17 no\n", dict(tries=2, steps=4)),
        ("11-3=8,8*3=24 no\n", dict(tries=1, steps=2, false_no=1)),
        ("11-3=8,8+3=11 yes\n", dict(tries=1, steps=2, said_yes=True, false_yes=1)),
        ("11+3=14,14+3=24 yes\n", dict(tries=1, steps=2, arithmetic_errors=1, said_yes=True, false_yes=1)),
        ("11+3=21,21+3=24 yes\n", dict(tries=1, steps=2, arithmetic_errors=1, said_yes=True, false_yes=1)),
        ("11-3=9,9+3=13 no\n", dict(tries=1, steps=2, arithmetic_errors=2)),
        ("12*2=24 yes\n", dict(tries=1, steps=1, illegal=1, said_yes=True, false_yes=1)),
        ("11+3=14 no\n", dict(tries=1, steps=1, illegal=1)),  # leaves a 3
        ("3+3=6,6+6=12 no\n", dict(tries=1, steps=2, illegal=1)),  # one 6 only
        ("3+3=6,11+6=17 no\n3+3=6,6+11=17 no\n3+3=6,11-6=5 no\n", dict(tries=3, steps=6, repeats=1)),
        ("11-3=8,8*3=24 yes\n11-3=8,3*8=24 yes\n", dict(tries=2, steps=4, repeats=1, said_yes=True)),
        ("11-3=8,8+3=11 yes\n" * 2, dict(tries=2, steps=4, repeats=1, said_yes=True, false_yes=1)),
        ("٣+3=6,11+6=17 no\n99999999999+3=6 no\n", {}),
    ],
)
def test_behaviour_by_hand(thinking, counts):
    for text in (said("x", thinking), thinking):  # a truncated text is all thinking
        assert behaviour(P, text) == ZERO | counts


def test_only_the_thinking_counts():
    assert behaviour(P, said("\n11-3=8,8*3=24 yes\n", "")) == ZERO


@pytest.mark.parametrize("level", LEVELS)
def test_behaviour_of_true_tries_is_clean(level):
    for p in all_problems(level)[:: len(all_problems(level)) // 20]:
        numbers, target = parse(p)
        lines = [f"{try_text(t)} {'yes' if value_of(t) == target else 'no'}\n" for t in tries(numbers, level)]
        counts = behaviour(p, said(p.reference, "".join(lines)))
        assert counts["tries"] == len(lines) and counts["steps"] == len(lines) * (len(numbers) - 1)
        assert all(counts[key] == 0 for key in ("arithmetic_errors", "illegal", "repeats", "false_yes", "false_no"))


def test_no_eval_in_the_verifier():
    source = open(countdown.__file__, encoding="utf-8").read()
    assert "eval(" not in source and "exec(" not in source


def test_attempts_are_where_they_stand_in_the_text():
    text = "<think>11+3=14,14+3=17:24 no\nhm\n11-3=8,8*3=24 yes\n</think>11-3=8,8*3=24:24 yes\n"
    found = attempts(P, text)
    assert [(text[a:b], good) for a, b, good in found] == [("11+3=14,14+3=17:24", False), ("11-3=8,8*3=24", True)]
    assert [text[b : b + 4] for _, b, _ in found] == [" no\n", " yes"]


# Questions that somebody types


@pytest.mark.parametrize("variant", countdown.VARIANTS)
def test_a_listed_problem_is_recognised_by_its_question(variant):
    for problem in spread(problems("test", variant=variant), 50):
        assert countdown.recognise(f" {problem.prompt}\n", variant) == problem


def test_other_questions():
    other_order = countdown.recognise("make 24 from 3,11,3")
    assert verify(other_order, said(other_order.reference)).status == "right"
    assert countdown.recognise("make 1000 from 1,2,3").reference == ""  # out of reach
    many = countdown.recognise("make 24 from 1,2,3,4,5,6,7,8,9")
    assert many.reference == "" and quickest(countdown.recognise, many.prompt) < 1
    assert verify(many, said("1+2+3+4+5+6+7+8-9-3")).status == "wrong"
    for text in ("hello", "make 24", "Make 24 from 1,2", "make 24 from 1,2 please", "", f"make {'9' * 5000} from 1"):
        assert countdown.recognise(text) is None
