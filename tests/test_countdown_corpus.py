"""countdown_corpus.py: a few thousand documents, parsed and checked."""

import hashlib
import re
from dataclasses import asdict, dataclass
from itertools import islice

import pytest

from minir1.tasks import Problem, countdown, load
from minir1.tasks.countdown_corpus import WORDS, Mix
from minir1.tasks.countdown_search import expected_tries, parse, tries, try_text, value_of
from minir1.tokenizer import EOS, UNK, word_level

COUNT = 4000
FACTS = re.compile(r"(\d+[-+*]\d+=\d+\n){8}|(\d+[-+*]\d+=\d+:\d+ (yes|no)\n){8}")
TAGGED = re.compile(r"User:(.*)\nAssistant:<think>((?:.*\n)*)</think><answer>(.*)</answer>")
UNTAGGED = re.compile(r"User:(.*)\nAssistant:((?:.*\n)+)(.*)")
LINE = re.compile(r"(.*):(\d+) (yes|no)")
SEARCHES = {"facts": 0, "impossible": 0, "at_once": 0, "sloppy": 0, "false_yes": 0}  # alone, and without slips


@dataclass(frozen=True)
class Document:
    """A parsed document."""

    problem: Problem
    lines: list[tuple[str, str, bool]]  # the try, the target, the verdict
    answer: str
    tagged: bool

    @property
    def right(self) -> bool:
        text = f"<think></think><answer>{self.answer}</answer>"
        return countdown.verify(self.problem, text).status == "right"


def read(text: str, level: str = "default") -> Document | None:
    """None for a document of sums; an error for other texts."""
    if FACTS.fullmatch(text):
        return None
    prompt, thinking, answer = (TAGGED.fullmatch(text) or UNTAGGED.fullmatch(text)).groups()
    lines = [LINE.fullmatch(line).groups() for line in thinking.splitlines()]
    lines = [(tried, target, verdict == "yes") for tried, target, verdict in lines]
    return Document(Problem(prompt, "", level=level), lines, answer, "<think>" in text)


def sample(mix: Mix = Mix(), count: int = COUNT, seed: int = 0, level: str = "default") -> list[str]:
    return list(islice(countdown.documents(seed, level, **asdict(mix)), count))


@pytest.fixture(scope="module")
def texts():
    return sample()


@pytest.fixture(scope="module")
def worked(texts):
    return [d for d in map(read, texts) if d]


@pytest.mark.parametrize("level", ["default", "wide"])
def test_only_train_problems_occur(level):
    """And unsolvable problems with their numbers."""
    known = {p.prompt: countdown.split_of(p) for p in countdown.all_problems(level)}
    numbers = {prompt: parse(Problem(prompt, ""))[0] for prompt in known}
    train = {numbers[prompt] for prompt, name in known.items() if name == "train"}
    unseen = {tuple(sorted(numbers[prompt])) for prompt, name in known.items() if name == "unseen"}
    documents = [d for d in (read(text, level) for text in sample(count=2000, level=level)) if d]
    assert len(documents) > 1500 and len(unseen) > 30
    solvable = [d for d in documents if d.problem.prompt in known]
    assert all(known[d.problem.prompt] == "train" for d in solvable)
    for d in documents:
        of, target = parse(d.problem)
        assert of in train and tuple(sorted(of)) not in unseen
        reached = target in map(value_of, tries(of, level))
        assert reached == (d.problem.prompt in known)
    assert len({d.problem.prompt for d in solvable}) > 0.4 * min(len(train), len(solvable))  # and they vary


def test_sums_are_right(texts):
    facts = [text for text in texts if read(text) is None]
    values = [re.split("[-+*=]", line) + [line] for text in facts for line in re.sub(":.*", "", text).splitlines()]
    for a, b, c, line in values:
        op = line[len(a)]
        assert int(c) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
        assert 1 <= int(c) <= 30 and int(a) >= int(b) >= 1
    share = {op: sum(op in line for *_, line in values) / len(values) for op in "+-*"}
    assert min(share.values()) > 0.1  # each operator is taught


def test_half_of_the_sums_are_checked_and_half_of_those_reach_their_target(texts):
    facts = [text for text in texts if read(text) is None]
    checked = [line for text in facts for line in text.splitlines() if ":" in line]
    assert near(sum(":" in text for text in facts), len(facts), Mix().checked)
    parts = [re.fullmatch(r".*=(\d+):(\d+) (yes|no)", line).groups() for line in checked]
    assert all((c == target) == (verdict == "yes") for c, target, verdict in parts)
    assert near(sum(verdict == "yes" for *_, verdict in parts), len(parts), 0.5)


def test_the_same_seed_is_the_same_stream(texts):
    assert sample(count=300) == texts[:300]
    assert sample(count=300, seed=1) != texts[:300]
    assert sample(count=300, mix=Mix(**SEARCHES)) != texts[:300]


def near(hits: int, count: int, share: float) -> bool:
    """Within four deviations of a share."""
    return abs(hits / count - share) < 4 * (share * (1 - share) / count) ** 0.5


def counted(d: Document) -> dict:
    """`countdown.behaviour` of the thinking."""
    lines = (f"{tried}:{target} {'yes' if verdict else 'no'}\n" for tried, target, verdict in d.lines)
    return countdown.behaviour(d.problem, "".join(lines))


def test_shares_are_those_of_the_mix(texts, worked):
    mix = Mix()
    assert near(len(texts) - len(worked), len(texts), mix.facts)
    at_once = [d for d in worked if not d.lines]
    searches = [d for d in worked if d.lines]
    assert near(len(at_once), len(worked), mix.at_once * (1 - mix.impossible))
    assert near(sum(not d.tagged for d in searches), len(searches), mix.untagged)
    assert all(d.tagged for d in at_once)
    assert len(at_once) >= 0.1 * len(texts)
    luck = sum(1 / expected_tries(d.problem) for d in at_once) / len(at_once)  # a random try may be right
    assert near(sum(d.right for d in at_once), len(at_once), mix.at_once_right + (1 - mix.at_once_right) * luck)
    counts = [counted(d) for d in searches]
    total = {key: sum(c[key] for c in counts) for key in counts[0]}
    assert total["tries"] == sum(len(d.lines) for d in searches) and total["illegal"] == 0
    assert near(total["arithmetic_errors"], total["steps"], mix.sloppy)
    failed = total["tries"] - sum(c["said_yes"] for c in counts) + total["false_yes"]
    assert near(total["false_yes"], failed, mix.false_yes)
    assert total["repeats"] > 0


def test_giving_up():
    """After each failed try with the probability of the mix, except in patient searches."""
    documents = list(map(read, sample(Mix(**SEARCHES, forgetful=0, patient=0, give_up=0.2), 1500)))
    failed = sum(not verdict for d in documents for _, _, verdict in d.lines)
    assert near(sum(not d.lines[-1][2] for d in documents), failed, 0.2)
    documents = map(read, sample(Mix(**SEARCHES, forgetful=0, patient=0.4, give_up=1), 1500))
    parted = [d for d in documents if not d.lines[0][2]]  # after the first try
    assert near(sum(d.lines[-1][2] for d in parted), len(parted), 0.4)


def test_unsolvable_problems_are_searched_in_full():
    """Every try once, in order, and no success; about as often as the mix says, where such a target exists."""
    solvable = {p.prompt for p in countdown.all_problems()}
    documents = list(map(read, sample(Mix(**SEARCHES | {"impossible": 1}), 400)))
    impossible = [d for d in documents if d.problem.prompt not in solvable]
    assert len(impossible) > 0.8 * len(documents)
    for d in documents:
        everything = [try_text(t) for t in tries(parse(d.problem)[0])]
        tried = [tried for tried, _, _ in d.lines]
        assert tried == everything[: len(tried)]
        if d.problem.prompt not in solvable:
            assert len(tried) == len(everything) and not any(verdict for _, _, verdict in d.lines) and not d.right
    some = list(map(read, sample(Mix(**SEARCHES | {"impossible": 0.3}), 1500)))
    share = 0.3 * len(impossible) / len(documents)
    assert near(sum(d.problem.prompt not in solvable for d in some), len(some), share)


@pytest.mark.parametrize("habit", ["orderly", "forgetful", "neither"])
def test_habits(habit):
    """Orderly searches follow the order of `tries`; forgetful ones repeat tries; the others do not."""
    choice = {"orderly": 0.0, "forgetful": 0.0} | ({habit: 1.0} if habit != "neither" else {})
    repeats = 0
    for d in map(read, sample(Mix(**SEARCHES, patient=1, **choice), 400)):
        tried = [x for x, _, _ in d.lines]
        repeats += len(tried) - len(set(tried))
        everything = [try_text(t) for t in tries(parse(d.problem)[0])]
        assert set(tried) <= set(everything)
        assert d.right or habit == "forgetful"  # patient searches find it
        if habit == "orderly":
            assert tried == everything[: len(tried)]
    assert (repeats > 100) == (habit == "forgetful")


def test_without_slips_every_verdict_is_true():
    for d in map(read, sample(Mix(**SEARCHES | {"impossible": 0.2}), 1500)):
        *before, last = [verdict for _, _, verdict in d.lines]
        assert not any(before)  # a success ends the search
        counts = counted(d)
        assert counts["tries"] == len(d.lines)
        assert not any(counts[key] for key in ("arithmetic_errors", "illegal", "false_yes", "false_no"))
        assert {t for _, t, _ in d.lines} == {str(parse(d.problem)[1])}
        assert last == d.right  # the answer is the last try


def test_a_slip_is_never_called_a_success():
    slips = steps = 0
    for d in map(read, sample(Mix(**SEARCHES | {"sloppy": 0.3}), 400)):
        for tried, target, verdict in d.lines:
            counts = countdown.behaviour(d.problem, f"{tried}:{target} {'yes' if verdict else 'no'}")
            slips, steps = slips + counts["arithmetic_errors"], steps + counts["steps"]
            assert not counts["illegal"] and not (counts["arithmetic_errors"] and verdict)
    assert near(slips, steps, 0.3)


def test_a_false_success_ends_the_search():
    documents = list(map(read, sample(Mix(**SEARCHES | {"false_yes": 0.2}), 800)))
    verdicts = [verdict for d in documents for _, _, verdict in d.lines]
    false_yes = sum(counted(d)["false_yes"] for d in documents)
    assert near(false_yes, false_yes + verdicts.count(False), 0.2)
    assert not any(verdict for d in documents for _, _, verdict in d.lines[:-1])


def test_extreme_mixes():
    assert all(read(text) is None for text in sample(Mix(facts=1), 50))
    documents = [read(text) for text in sample(Mix(**SEARCHES | {"at_once": 1}, at_once_right=1), 200)]
    assert all(not d.lines and d.right and d.tagged for d in documents)
    assert not any(read(text).tagged for text in sample(Mix(**SEARCHES, untagged=1), 50))


@pytest.mark.parametrize("level", ["default", "wide"])
def test_every_document_survives_the_tokenizer(level):
    tokenizer = word_level(WORDS, 100)
    unknown, some = tokenizer.id(UNK), sample(count=2000, level=level)
    for text, row in zip(some, tokenizer.encode_batch([text + EOS for text in some])):
        assert unknown not in row and tokenizer.decode(row) == text + EOS
    assert len(tokenizer.encode("User:make 24 from 11,3,3\nAssistant:")) == 10  # a word is a token


def test_a_prompt_is_the_beginning_of_a_document(worked, texts):
    tokenizer = word_level(WORDS, 100)
    prompts = {tokenizer.chat(d.problem.prompt) for d in worked[:50]}
    for prompt in prompts:
        text = next(text for text in texts if text.startswith(prompt))
        assert tokenizer.encode(text)[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"facts": 1.5}, "facts = 1.5"),
        ({"at_once": -0.1}, "at_once = -0.1"),
        ({"sloppy": float("nan")}, "sloppy = nan"),
        ({"orderly": 0.75, "forgetful": 0.5}, r"orderly \+ Mix.forgetful = 1.25"),
    ],
)
def test_mix_rejects_bad_shares(change, field):
    with pytest.raises(ValueError, match=field):
        Mix(**change)
    Mix(orderly=0.7, forgetful=0.3)


def test_the_corpus_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match="'easy'"):
        countdown.documents(0, "easy")
    with pytest.raises(ValueError, match="the mix has no patience; it has facts, checked, .*longest"):
        countdown.documents(0, patience=0.5)


DIGESTS = {"default": "410078d8db71a5d5", "wide": "2ec3aa6d25207a71", "four": "c6cccbb4763449fa"}


@pytest.mark.parametrize("level", DIGESTS)
def test_the_corpus_never_changes(level):
    text = "\n".join(islice(load(f"countdown:{level}").documents(5), 300))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[level]


@pytest.mark.parametrize("level", DIGESTS)
def test_probes_ask_for_true_sums_and_verdicts(level):
    """Five tries per problem, the last a solution; each labelled piece is one token."""
    task = load(f"countdown:{level}")
    tokenizer = word_level(*task.vocabulary())
    probes = task.probes()
    assert len(probes) == 100
    for pieces in probes:
        text = "".join(piece for piece, _ in pieces)
        rows = [tokenizer.encode(piece) for piece, _ in pieces]
        assert sum(rows, []) == tokenizer.encode(text) and tokenizer.id(UNK) not in tokenizer.encode(text)
        assert all(len(row) == 1 for row, (_, label) in zip(rows, pieces) if label)
        prompt, _, lines = text.removeprefix("User:").partition("\nAssistant:<think>")
        assert text.startswith(tokenizer.chat(prompt))
        problem = Problem(prompt, "", level=level)
        counts = countdown.behaviour(problem, lines)
        assert counts["tries"] == lines.count("\n") <= 5 and counts["said_yes"]
        assert not any(counts[key] for key in ("arithmetic_errors", "illegal", "false_yes", "false_no"))
        assert [label for _, label in pieces].count("sums") == counts["steps"]
        assert [piece.strip() for piece, label in pieces if label in ("yes", "no")] == re.findall("yes|no", lines)
