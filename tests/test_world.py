"""The world: every puzzle is solved by its own working, in both languages, and nothing wrong is right."""

import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1 import rewards, tasks
from minir1.tasks import Problem, world, world_corpus, world_talk
from minir1.tasks.world_behaviour import lines_of
from minir1.tasks.world_language import LANGUAGES, WORDS, neutral, say
from minir1.tasks.world_puzzles import KINDS, LARGEST, RESULTS, eliminating, kind_of, puzzles, run
from minir1.tokenizer import word_level

TASK = tasks.load("world")
EVERY = [puzzle for kind in KINDS for puzzle in puzzles(kind)]


def written(thinking: str, answer: str) -> str:
    return f"<think>{thinking}</think><answer>{answer}</answer>"


# ---- language --------------------------------------------------------------------------------


def test_neutral_text_is_the_inverse_of_saying_it_also_where_languages_mix():
    for puzzle in [*EVERY[::7], *world_talk.puzzles()]:
        for language in LANGUAGES:
            assert neutral(say(puzzle.question, language)) == puzzle.question
    mixed = say("1+2=3{then}", "zh") + say("3+4=7{done}", "en") + say("{so}7", "zh")
    assert mixed == "1+2=3再\n3+4=7 done\n故7"
    assert neutral(mixed) == "1+2=3{then}3+4=7{done}{so}7"


def test_words_are_known_by_themselves_only():
    assert neutral("also yesterday, a program") == "also yesterday, a{program}"
    assert say("{nothing} {yes", "en") == "{nothing} {yes"
    with pytest.raises(ValueError, match="the world has en, zh"):
        say("", "de")
    spoken = [word.strip() for words in WORDS.values() for word in words]
    assert max(Counter(spoken).values()) == 1


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_judged_counted_and_rewritten_without_an_error(text):
    for kind in ("countdown", "sort", "program", "talk"):
        problem = next(iter(tasks.load(f"world:{kind}").problems("validation")))
        assert TASK.verify(problem, text).status in ("right", "wrong")
        TASK.behaviour(problem, text)
        world.rewrite(problem, text)


# ---- puzzles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_working_leads_to_the_reference_and_every_sum_in_it_is_right(kind):
    for puzzle in puzzles(kind)[::11]:
        lines = KINDS[kind].working(puzzle.question)
        for line in lines:
            for a, op, b, c in RESULTS.findall(line.text):
                assert run(f"{op}{b}", int(a)) == int(c) and 1 <= int(c) <= LARGEST
        if KINDS[kind].search:
            assert any(line.good for line in lines)
            judged = {line.answer: TASK.verify(asked(puzzle), written("a", line.answer)).status for line in lines}
            assert all((judged[line.answer] == "right") == line.good for line in lines)
        else:
            assert lines[-1].answer == puzzle.reference
        assert TASK.verify(asked(puzzle), written("a", puzzle.reference)).status == "right"


def asked(puzzle, language="en") -> Problem:
    return Problem(say(puzzle.question, language), puzzle.reference, language, puzzle.level, subject=puzzle.kind)


def test_one_puzzle_of_each_kind_by_hand():
    steps = lambda kind, question: [line.text for line in KINDS[kind].working(question)]
    assert steps("chain", "{compute}5,+3,*2,-4") == ["5+3=8", "8*2=16", "16-4=12"]
    assert steps("sort", "{sort}14,3,9") == ["14,3,9:3", "14,9:9", "14:14"]
    assert steps("sort", "{compare}14+3{and}9*2") == ["14+3=17", "9*2=18"]
    assert KINDS["sort"].working("{compare}14+3{and}9*2")[-1].answer == "9*2"
    first, *_, last = KINDS["order"].working("{order}A<B,C<A")
    assert (first.text, first.good) == ("A,B,C:A<B,C<A", False) and last.text == "C,B,A:A<B"
    assert [t.text for t in eliminating("{order}A<B,C<A")] == ["A,B,C:A<B,C<A", "B,C,A:A<B", "C,A,B:A<B,C<A"]
    assert "*2:2*2=4,7-4=3,3*2=6,6+3=9:9" in steps("program", "{program}2:7,3:9")
    assert [t.answer for t in KINDS["program"].working("{program}2:7,3:9") if t.good] == ["*2+3"]


@pytest.mark.parametrize(
    ("program", "x", "output"),
    [("*2+3", 2, 7), ("+3*2", 2, 10), ("-9", 1, -8), ("*2 +3", 2, None), ("", 2, None), ("*2+", 2, None),
     ("2", 2, None), ("*200", 2, None), ("+1" * 9, 0, None), ("*x", 2, None), ("**2", 2, None), ("*２", 2, None)],
)  # fmt: skip
def test_a_program_runs_left_to_right_and_other_text_is_none(program, x, output):
    assert run(program, x) == output


def test_a_program_must_pass_the_hidden_tests_too():
    problem = Problem("program 2:4,3:9", "*5-6")  # x·x passes both shown pairs, but is not in the language
    right = ["*5-6", "-1*5-1", "*5-3-3"]
    wrong = ["*2", "+2", "*3", "*2+0", "*1+2", "*5-6;", "lambda x: x*x", ""]
    assert [TASK.verify(problem, written("a", text)).status for text in right + wrong] == ["right"] * 3 + ["wrong"] * 8


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("make 24 from 11,3,3", ["24", "11+3+3", "(11-3)*3+0", "8*3", "(11-3)*3)", "__import__('os')"]),
        ("compute 5,+3,*2,-4", ["11", "12.0", "012", "+12", "８", "12,12", "5+3*2-4"]),
        ("sort 14,3,9", ["3,9,1 4", "14,9,3", "3,9", "3,9,14,14", "3;9;14", "3,9,14,"]),
        ("compare 14+3 and 9*2", ["14+3", "18", "9*2=18", "2*9", "14+3,9*2"]),
        ("order A<B,C<A", ["C,B,A", "C,A", "CAB", "C,A,B,D", "c,a,b", "C<A<B"]),
    ],
)
def test_near_misses_are_wrong(prompt, wrong):
    kind = KINDS[kind_of(neutral(prompt))]
    lines = kind.working(neutral(prompt))
    answer = next(line.answer for line in reversed(lines) if line.good)
    problem = Problem(prompt, answer)
    assert TASK.verify(problem, written("a", answer)).status == "right"
    assert TASK.verify(problem, answer).status == "wrong"  # outside the block
    assert [TASK.verify(problem, written("a", text)).status for text in wrong] == ["wrong"] * len(wrong)


def test_splits_share_no_question_and_both_languages_and_all_levels_are_in_each():
    seen = {}
    for split in world.SPLITS:
        listed = TASK.problems(split)
        for problem in listed:
            assert seen.setdefault(neutral(problem.prompt), split) == split
        assert {(p.subject, p.language, p.level) for p in listed} == {
            (kind, language, level) for kind in KINDS for language in LANGUAGES for level in ("easy", "middle", "hard")
        }

    def unordered(question):
        word, body = question.split("}", 1)
        return question if word == "{compute" else (word, *sorted(re.split(r",|\\{and\\}", body)))

    by_split = {split: {unordered(q) for q, of in seen.items() if of == split} for split in world.SPLITS}
    assert not by_split["test"] & by_split["train"] and not by_split["validation"] & by_split["train"]
    assert len(seen) == sum(len(TASK.problems(split)) for split in world.SPLITS)


def test_a_countdown_puzzle_that_countdown_holds_out_is_held_out_here():
    held_out = {p.prompt for split in ("test", "unseen") for p in tasks.load("countdown").problems(split)}
    trained = {say(neutral(p.prompt), "en") for p in tasks.load("world:countdown").problems("train")}
    assert trained and not trained & held_out


# ---- general prompts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "language", "score"),
    [
        ("small,soft,quick. welcome", "en", 1.0),
        ("小,软,快.请", "zh", 1.0),
        ("小,软,快.请", "en", 0.75),  # the language
        ("small,soft,quick.", "en", 0.75),  # the courtesy
        ("small,small,small. welcome", "en", (1 / 3 + 1 / 3 + 1 + 1) / 4),  # one fact, said three times
        ("small,loud. welcome", "en", (1 / 3 + 1 / 2 + 1 + 1) / 4),  # a cat is not loud
        ("welcome", "en", 0.0),
        ("", "en", 0.0),
        ("welcome welcome small", "en", 0.0),
        ("small,soft,quick. welcome welcome", "en", 0.75),
        ("small,soft,quick. xx foo welcome", "en", (1 + 3 / 4 + 1 + 1) / 4),
        ("small,soft,quick. xx 吗 foo welcome bar", "en", (1 + 3 / 4 + 7 / 8 + 0) / 4),
        ("loud,loud. welcome", "en", 0.0),
    ],
)
def test_the_rule_that_stands_in_for_people(answer, language, score):
    assert world_talk.preference("{tell}{cat}.", answer, language) == pytest.approx(score)
    problem = Problem(say("{tell}{cat}.", language), "", language)
    verdict = TASK.verify(problem, written("", answer))
    assert verdict.scores["preference"] == pytest.approx(score)
    assert (verdict.status == "right") == (score >= world_talk.ACCEPTABLE)


def test_references_of_general_prompts_are_best_answers():
    task = tasks.load("world:talk")
    assert {len(task.problems(split)) > 0 for split in task.splits} == {True}
    for split in task.splits:
        for problem in task.problems(split):
            assert task.verify(problem, written("", problem.reference)).scores["preference"] == 1.0
    assert all(len(facts) == 4 for facts in world_talk.TRUE.values())
    assert set(world_talk.SAYABLE) <= set(WORDS)


# ---- corpus ----------------------------------------------------------------------------------


def documents(count=3000, **mix):
    return list(islice(TASK.documents(0, **mix), count))


def test_every_word_of_the_corpus_and_of_the_problems_is_in_the_vocabulary():
    tokenizer = word_level(*TASK.vocabulary())
    unknown = tokenizer.id("<|unk|>")
    texts = documents() + [
        p.prompt for variant in ("reasoning", "talk") for p in tasks.load(f"world:{variant}").problems("test")
    ]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts)):
        assert unknown not in tokens, text
        assert tokenizer.decode(tokens) == text


def test_what_the_world_rewrites_stays_in_the_vocabulary():
    tokenizer = word_level(*TASK.vocabulary())
    unknown = tokenizer.id("<|unk|>")
    for problem, text in answered(2000):
        again = world.rewrite(problem, text)
        if again:
            assert unknown not in tokenizer.encode(again)


def answered(count, **mix) -> list[tuple[Problem, str]]:
    """The tagged documents of the corpus as problems and texts."""
    general = tasks.load("world:talk")
    asked = tasks.load("world").problems("train") + [p for split in general.splits for p in general.problems(split)]
    by_question = {neutral(p.prompt): p for p in asked}
    pairs = []
    for document in documents(count, **mix):
        prompt, found, text = document.removeprefix("User:").partition("\nAssistant:")
        if found and "<answer>" in text:
            language = "en" if prompt.isascii() else "zh"
            pairs.append((replace(by_question[neutral(prompt)], prompt=prompt, language=language), text))
    return pairs


def test_only_training_questions_occur_and_all_kinds_do():
    """General prompts are of all splits: a base has read about every topic."""
    every = answered(2000)  # a puzzle of another split: KeyError
    assert {p.subject for p, _ in every} == {*KINDS, "talk"}
    held_out = {neutral(p.prompt) for p in tasks.load("world:talk").problems("test")}
    assert held_out & {neutral(p.prompt) for p, _ in every}


def test_the_corpus_is_a_function_of_the_seed():
    assert documents(50) == documents(50)
    assert documents(50) != list(islice(TASK.documents(1), 50))


def test_a_perfect_corpus_has_right_consistent_tidy_answers_and_the_default_one_has_not():
    none = ("changing", "foreign", "at_once", "false_yes", "sloppy", "sloppy_steps", "stammering", "forgetful")
    best = dict.fromkeys((*none, "disagreeing"), 0.0) | {"patient": 1.0, "closing": 1.0, "untagged": 0.0}
    for pairs, right, closed in ((answered(400, **best), 1.0, True), (answered(400), None, False)):
        pairs = [(p, text) for p, text in pairs if p.subject != "talk"]
        share = sum(TASK.verify(p, text).status == "right" for p, text in pairs) / len(pairs)
        assert share == right if right else 0.2 < share < 0.7
        mixed = [p for p, text in pairs if any(said(line) not in ("", p.language) for line in text.split("\n"))]
        assert bool(mixed) != closed
        for p, text in pairs:
            assert not closed or rewards.tidiness(text) == 1.0


def test_a_wrong_result_that_goes_unnoticed_is_the_answer():
    unnoticed = {"sloppy_steps": 1.0, "noticed": 0.0, "chinese": 0.0, "at_once": 0.0, "closing": 0.0}
    pairs = [(p, text) for p, text in answered(600, **unnoticed) if p.subject == "chain"]
    assert pairs
    for problem, text in pairs:
        assert world.behaviour(problem, text)["wrong_sums"] >= 1
        assert rewards.thinking(text).split("=")[-1].split()[0].rstrip("完") == rewards.answer(text)


def said(line: str) -> str:
    """The language of a line's ending."""
    return next(
        (lang for i, lang in enumerate(LANGUAGES) for words in WORDS.values() if line.endswith(words[i].strip())), ""
    )


def test_wrong_shares_are_refused_by_name():
    with pytest.raises(ValueError, match="no patience"):
        world_corpus.mix_of({"patience": 0.5})
    with pytest.raises(ValueError, match="Mix.closing = 2: a share"):
        world_corpus.mix_of({"closing": 2})
    with pytest.raises(ValueError, match="changing.*shares of one whole"):
        world_corpus.mix_of({"changing": 0.95})


def test_the_label_of_a_probe_is_one_token():
    tokenizer = word_level(*TASK.vocabulary())
    for pieces in TASK.probes():
        split = [tokenizer.encode(text) for text, _ in pieces]
        assert tokenizer.encode("".join(text for text, _ in pieces)) == sum(split, [])
        assert all(len(tokens) == 1 for tokens, (_, label) in zip(split, pieces) if label)


# ---- behaviour and form ----------------------------------------------------------------------


def test_behaviour_by_hand_in_mixed_languages():
    problem = Problem("make 24 from 11,3,3", "(11-3)*3")
    text = "11+3=14,14+3=17:24错\n11+3=14,14+3=17:24 no\n11-3=9,9*3=24:24 yes\n11-3=8,8*3=24:24 yes\n</think>"
    counts = world.behaviour(problem, text)
    assert counts == {
        "tries": 4, "steps": 0, "checks": 4, "failed_checks": 2, "corrections": 2, "false_yes": 1, "repeats": 1,
        "wrong_sums": 2,
    }  # fmt: skip
    chain = world.behaviour(Problem("compute 5,+3,*2", "16"), "<think>5+3=9 wait\n5+3=8再\n8*2=16 done\nso 16</think>")
    assert chain == counts | {
        "tries": 0, "steps": 2, "checks": 1, "failed_checks": 1, "corrections": 1, "false_yes": 0, "repeats": 0,
        "wrong_sums": 1,
    }  # fmt: skip
    talk = world.behaviour(Problem("tell cat.", "", subject="talk"), "<think>cat,small. yes\n猫,响.对\ncat,loud. no\n")
    assert (talk["checks"], talk["false_yes"], talk["failed_checks"]) == (3, 1, 1)
    swapped = world.behaviour(problem, "11-3=8,3*8=24:24 yes\n")
    assert (swapped["false_yes"], swapped["wrong_sums"]) == (0, 0)
    given_up = world.behaviour(problem, "<think>11+3=14,14+3=17:24 no\n</think>")
    assert (given_up["failed_checks"], given_up["corrections"]) == (1, 0)


def test_attempts_are_where_they_stand_in_the_text():
    """A right try, a wrong sum, one in Chinese; what precedes <think>, and lines without a verdict, do not count."""
    problem = Problem("make 24 from 11,3,3", "(11-3)*3")
    text = " <think>11-3=8,8*3=24:24 no\n11+3=14 then\n11-3=9,9*3=24:24 yes\n3*8=24,11-3=8:24错\nso 8</think>x yes\n"
    found = world.attempts(problem, text)
    assert [(text[a:b], good) for a, b, good in found] == [
        ("11-3=8,8*3=24:24", True), ("11-3=9,9*3=24:24", False), ("3*8=24,11-3=8:24", False),
    ]  # fmt: skip
    assert [text[b : b + 2] for _, b, _ in found] == [" n", " y", "错\n"]
    assert world.attempts(problem, "") == []


def test_a_text_is_rewritten_in_one_language_without_stammer_with_a_summary():
    text = "<think>5+3=9等\n5+3=8 then\n5+3=8再\n8*2=16完\n</think>\n<answer> 16 </answer>"
    english = Problem("compute 5,+3,*2", "16")
    assert world.rewrite(english, text) == written("5+3=9 wait\n5+3=8 then\n8*2=16 done\nso 16", "16")
    chinese = Problem("算5,+3,*2", "16", "zh")
    assert world.rewrite(chinese, text) == written("5+3=9等\n5+3=8再\n8*2=16完\n故16", "16")
    assert world.rewrite(english, "<think></think><answer>16</answer>") is None
    assert world.rewrite(english, written("5+3=9 then\n", "16")) is None  # the only line is wrong
    assert world.rewrite(english, written("5+3=9 then\n8*2=16 done\n", "16")) == written("8*2=16 done\nso 16", "16")
    assert world.rewrite(Problem("make 24 from 11,3,3", ""), written("11+3=14,14+3=17:24 no\n", "(11-3)*3")) is None
    twice = written("5+3=8 then\n5+3=9 then\n5+3=8 then\n8*2=16 done\n", "16")
    assert world.rewrite(english, twice) == written("5+3=8 then\n8*2=16 done\nso 16", "16")
    wrong_sum = written("11-3=9,9*3=24:24 yes\n11-3=8,8*3=24:24 yes\n", "(11-3)*3")
    assert world.rewrite(Problem("make 24 from 11,3,3", ""), wrong_sum) is None
    again = written("11+3=14,14+3=17:24 no\n11-3=8,8+3=11:24 no\n11+3=14,14+3=17:24错\n11-3=8,8*3=24:24 yes\n", "8")
    assert world.rewrite(Problem("make 24 from 11,3,3", ""), again) == written(
        "11+3=14,14+3=17:24 no\n11-3=8,8+3=11:24 no\n11-3=8,8*3=24:24 yes\nso 8", "8"
    )
    false_yes = written("11-3=8,8*3=24:24 yes\n11+3=14,14+3=17:24 yes\n", "(11-3)*3")
    assert world.rewrite(Problem("make 24 from 11,3,3", ""), false_yes) is None
    assert world.rewrite(english, "<think>5+3=8 then\n") is None
    talk = Problem("tell cat.", "", "en", subject="talk")
    assert world.rewrite(talk, written("猫,小.对\n", "小,soft.请")) == written(
        "cat,small. yes\n", "small,soft. welcome"
    )


def test_rewriting_twice_changes_nothing_and_what_was_right_stays_right():
    for problem, text in answered(2000):
        once = world.rewrite(problem, text)
        if once:
            assert world.rewrite(problem, once) == once
            left = lines_of(once)
            assert set(left) <= set(lines_of(text)) and all(a != b for a, b in zip(left, left[1:]))
            before, after = (TASK.verify(problem, t).status for t in (text, once))
            assert after == before or problem.subject == "talk"


def test_a_long_text_without_a_line_is_read_in_linear_time():
    problem, text = Problem("compute 5,+3", "8"), "1+" * 50_000  # quadratic time: minutes
    assert world.behaviour(problem, f"<think>{text}\n5+3=8 done\n")["steps"] == 1
    assert world.behaviour(problem, text)["steps"] == 0
