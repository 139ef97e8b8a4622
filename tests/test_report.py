"""report.py on a made-up run: its numbers by hand, its page safe against what a model may write."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import r1_run
import torch
from matplotlib.text import Text
from r1_run import HOSTILE, PROBLEMS, SETTINGS, SMALL, TESTED, build

from experiments import (
    report,
    report_claims,
    report_figures,
    report_model_figures,
    report_page,
    report_run,
    report_write,
)  # fmt: skip
from minir1 import answer_file
from minir1.figures import DPI
from minir1.judge import Answer
from minir1.log import read_metrics
from minir1.model.config import dense
from minir1.model.transformer import Transformer

FIGURES = {"scores", "flaws", "behaviour", "budget", "sft_loss", "rl_reward", "loss_and_reward", "timeline"}
OF_THE_MODEL = {"parameters", "window", "context"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A whole run; tests that change files copy it."""
    return build(tmp_path_factory.mktemp("run") / "r1")


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of the report on the whole run, and its numbers."""
    out = tmp_path_factory.mktemp("report")
    assert report.main(report.Config(built, out=out)) == out / "report.html"
    return out, numbers(out)


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """The whole run, to be changed."""
    return Path(shutil.copytree(built, tmp_path / "r1"))


@pytest.fixture
def undrawn(monkeypatch):
    """Without figures, which take most of the time."""
    monkeypatch.setattr(report_figures, "draw", lambda *_: {})


class Seen(HTMLParser):
    """Tags, their attributes, and the text of a page; tags that are not closed stay in `open`."""

    EMPTY = {"meta", "img", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [tag] if tag not in self.EMPTY else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def html_of(path: Path) -> str:
    return (path / "report.html").read_text(encoding="utf-8")


def numbers(path: Path) -> dict:
    return json.loads((path / "report.json").read_text())


def put(file: Path, **values) -> None:
    """Change entries of a JSON file; Ellipsis removes one."""
    new = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in new.items() if value is not ...}))


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_is_one_file_that_reaches_for_nothing_and_runs_nothing(whole):
    page = html_of(whole[0])
    seen = Seen(page)
    assert seen.open == [] and "script" not in seen.tags
    reaching = [value for name, value in seen.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert len(reaching) == len(FIGURES | OF_THE_MODEL)
    assert all(value.startswith("data:image/png;base64,") for value in reaching)
    assert not re.search(r"url\(|@import", page) and not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and "@media print" in page


def test_every_figure_is_drawn_and_linked_in_markdown(whole):
    text = (whole[0] / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^]]+\]\(figures/(\w+)\.png\)", text)
    assert set(linked) == FIGURES | OF_THE_MODEL and len(linked) == len(set(linked))
    for name in linked:
        data = (whole[0] / "figures" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") == 12 * DPI


def texts(figure) -> str:
    """All that is written in a figure."""
    return " | ".join(text.get_text() for text in figure.findobj(Text))


def test_the_figure_of_rewards_says_the_temperature_of_each_stage(built, tmp_path):
    run = report_run.read(built)
    said = texts(report_figures.rl_reward(run, tmp_path / "a.png"))
    assert "R1-Zero, T = 1 |" in said and "RL 2, T = 0.7 |" in said and "sums of different parts" in said
    one = run._replace(stages={"r1-zero": run.stages["r1-zero"]})
    assert "sums of different parts" not in texts(report_figures.rl_reward(one, tmp_path / "a.png"))


def test_language_consistency_is_called_by_its_name(built, whole, tmp_path):
    assert "The mean language consistency of R1-Zero's thinking is 0.720." in Seen(html_of(whole[0])).text
    said = texts(report_figures.flaws(report_run.read(built), tmp_path / "a.png"))
    assert "Flaws by stage: language consistency 0.700 → 0.992" in said and "language consistency below 1" in said


def test_what_a_model_writes_is_shown_and_is_no_markup(whole):
    seen = Seen(html_of(whole[0]))
    assert '<script>alert("x")</script>' in seen.text and "<img src=http://x.y/z>" in seen.text
    assert "\u202e" not in seen.text and "\x00" not in seen.text and "no answer: the thinking never ends" in seen.text
    assert "24对" in seen.text and "✓ right" in seen.text and "✗ wrong" in seen.text
    text = (whole[0] / "report.md").read_text(encoding="utf-8")
    assert "\x00" not in text and "`````text\n```` <script>" in text  # a longer fence than that of the answer


def test_markdown_quotes_what_would_be_markup():
    page = report_page.Page("a *b* <c>", "", [report_page.Section("t", [report_page.Table(["x|y"], [["`[z]`\n"]])])])
    assert report_write.markdown(page, Path(".")).splitlines() == [
        r"# a \*b\* \<c\>", "", "", "", "## t", "", r"| x\|y |", "| --- |", r"| \`\[z\]\` |",
    ]  # fmt: skip


def test_the_finding_says_what_the_numbers_say(built, whole):
    text, values = html_of(whole[0]), whole[1]
    low, high = 100 * values["gain/final_low"], 100 * values["gain/final_high"]
    assert f"{100 * values['gain/final']:+.1f} points [{low:.1f}, {high:.1f}], paired" in text
    assert "language consistency 0.720 → 0.992, repetition 0.180 → 0.015" in text
    assert "The stages took 1,715 s together." in text
    said = report_page.finding(report_run.read(built), {"gain/r1-zero": (0.1, -0.01, 0.2)})
    assert "did not raise accuracy" in said
    for low, words in ((0.01, "better than"), (-0.02, "level with"), (-0.021, "not shown to be level with")):
        assert f"and is {words} R1-Zero" in report_page.finding(report_run.read(built), {"gain/final": (0, low, 1)})


def test_the_table_of_stages_has_every_test_with_its_intervals(built):
    run = report_run.read(built)
    assert report_run.groups(run.tests) == (
        ["easy", "middle", "hard"],
        ["chain", "countdown", "order", "program", "sort", "en", "zh"],
    )
    table, _ = report_page.quality(run, report_run.groups(run.tests))
    assert table.head == ["", "Base", "R1-Zero", "SFT 1", "RL 1", "SFT 2", "RL 2"]
    rows = {row[0]: row[1:] for row in table.rows}
    values = run.tests["rl-1"]
    ends = [100 * values[f"pass@1{end}_hard"] for end in ("", "_low", "_high")]
    assert rows["– hard"][3] == "{:.1f}% [{:.1f}, {:.1f}]".format(*ends)
    assert rows["tidiness"] == ["0.200", "0.300", "0.950", "0.970", "0.970", "0.990"]
    assert {"– sort", "maj@4", "pass@4", "forced to answer at once", "general prompts: preference"} <= rows.keys()


def test_the_table_of_costs_adds_up(built):
    rows = {row[0]: row[1:] for row in report_page.cost(report_run.read(built)).rows}
    assert rows["Base"] == ["pre-training", "60", "-", "245,760", "600"]  # 60 steps of 4,096
    assert rows["R1-Zero"] == ["RL", "60", "540,000", "540,000", "420"]  # 60 steps of 9,000
    assert rows["Preference pairs"] == ["sampling", "-", "30,000", "-", "25"]  # as r1.py measured it
    assert rows["all"] == ["", "", "2,250,000", "2,365,760", "1,715"]


def test_the_seconds_of_a_stage_are_the_pipelines_or_else_its_own(copy):
    assert report_run.read(copy).stages["sft-1"].seconds == 40
    (copy / "result.json").unlink()
    stages = report_run.read(copy).stages
    assert stages["sft-1"].seconds == 37 and stages["pairs"].seconds is None and stages["rl-1"].start == 1083


def test_the_questions_are_of_different_kinds_in_both_languages(built):
    first, second, third = report.shown(report_run.read(built))
    spoken = {p.prompt: p.language for p in PROBLEMS}
    kinds = list(dict.fromkeys(p.subject for p in PROBLEMS))
    assert [one.subject for one in (first, second, third)] == [kinds[0], kinds[2], kinds[4]]
    assert [spoken[one.prompt] for one in (first, second, third)] == ["en", "zh", "en"]
    for one in (first, second, third):
        of_kind = [p for p in PROBLEMS if p.subject == one.subject and p.language == spoken[one.prompt]]
        assert one.prompt == of_kind[0].prompt
        assert list(one.answers) == ["Base", "R1-Zero", "SFT 1", "RL 1", "SFT 2", "RL 2"]
    assert first.answers["Base"].text == HOSTILE


def test_an_answer_is_split_after_its_thinking():
    assert report_page._split("<think>a\nb</think> <answer>c</answer>") == ("a\nb", "<answer>c</answer>")
    assert report_page._split("a</think>b</think>") == ("a", "b</think>")
    assert report_page._split("<think>a <answer>b") == ("a <answer>b", "")


# ---- what the claims rest on -------------------------------------------------------------------


def pipeline(path: Path, tests: dict, answers: dict | None = None, **more) -> report_run.Pipeline:
    """A pipeline of these results alone; answers: stage -> whether each answer is right, by problem.

    A right answer is 1, a wrong one is 2, after as many checks as `checked` has for the stage, else none.
    """
    checked = more.pop("checked", {})
    text = lambda right, checks: "<think>" + "1=1:1 yes\n" * checks + f"</think><answer>{2 - right}</answer>"
    make = lambda row, checks: [Answer(text(r, checks), 10 + 5 * r, False, r > 0, True) for r in row]
    saved = {
        name: answer_file.Saved(
            dict(SETTINGS),
            {"sampled": {p: make(row, checked.get(name, 0)) for p, row in enumerate(grid)}},
            {p: (PROBLEMS[p].prompt, PROBLEMS[p].reference) for p in range(len(grid))},
            {p: (PROBLEMS[p].subject, PROBLEMS[p].language) for p in range(len(grid))},
        )
        for name, grid in (answers or {}).items()
    }
    parts = {"stages": {}, "general": {}, "replies": {}, "budget": {}} | more
    return report_run.Pipeline(path, tests=tests, answers=saved, **parts)


def liked(preference: float) -> answer_file.Saved:
    """One answer to each of two general prompts, of this preference."""
    answer = Answer("", 1, False, True, True, scores={"preference": preference})
    return answer_file.Saved({}, {"sampled": {0: [answer], 1: [answer]}}, {}, {})


def test_differences_are_paired_over_problems(tmp_path):
    run = pipeline(tmp_path, {}, {"base": [[1, 0], [0, 0], [1, 1]], "r1-zero": [[1, 1], [1, 0], [1, 1]]})
    mean, low, high = report_claims.paired(run.answers, "r1-zero", "base")
    assert mean == pytest.approx(1 / 3) and 0 <= low < mean < high <= 0.5  # ½, ½ and 0
    assert report_claims.paired(run.answers, "base", "r1-zero")[0] == pytest.approx(-1 / 3)
    assert report_claims.paired(run.answers, "r1-zero", "base", report_claims.tokens)[0] == pytest.approx(5 / 3)
    assert report_claims.paired(run.answers, "rl-1", "base") is None


def test_an_answer_that_was_not_judged_counts_in_no_difference(tmp_path):
    run = pipeline(tmp_path, {}, {"base": [[0], [0]], "r1-zero": [[1], [0]]})
    lost = Answer("", 1, False, False, False, unjudged=True)
    run.answers["base"].answers["sampled"][1] = [lost]
    assert report_claims.paired(run.answers, "r1-zero", "base") == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("key, zero, final, holds", [
    ("language_consistency", 0.7, 0.98, True), ("language_consistency", 0.7, 0.979, False),
    ("repetition", 0.2, 0.1, True), ("repetition", 0.2, 0.101, False),
])  # fmt: skip
def test_readability_holds_from_the_stated_threshold(tmp_path, key, zero, final, holds):
    run = pipeline(tmp_path, {"r1-zero": {key: zero}, "rl-2": {key: final}})
    *_, claim = report_claims.claims(run)
    assert claim.holds is holds and claim.text.startswith("The final model (RL 2) is more readable")
    assert claim.shown == f"{zero:.3f} → {final:.3f}"


def test_the_final_model_is_level_if_the_interval_ends_above_minus_two_points(tmp_path):
    same = [[1, 0]] * 40
    worse = [[0, 0]] * 10 + same[10:]  # 12.5 points less
    for grid, holds in ((same, True), (worse, False)):
        run = pipeline(tmp_path, {"r1-zero": {}, "rl-2": {}}, {"r1-zero": same, "rl-2": grid})
        claim = next(c for c in report_claims.claims(run) if "at least level" in c.text)
        assert claim.holds is holds
        assert claim.shown.startswith("+0.0 points [0.0, 0.0]" if holds else "-12.5 points")


def test_claims_that_do_not_hold_say_no(tmp_path):
    base = {"pass@1": 0.5, "checks": 2.0}
    zero = {"pass@1": 0.5, "pass@1_low": 0.4, "forced": 0.3, "forced_low": 0.2, "forced_high": 0.41, "checks": 2.1}
    zero |= {"language_consistency": 0.99, "maj@2": 0.5}
    answers = {"base": [[1, 0]] * 9, "r1-zero": [[1, 0]] * 9}
    general = {"sft-2": {"preference": 0.5}, "rl-2": {"preference": 0.49}}
    replies = {name: liked(values["preference"]) for name, values in general.items()}
    more = {"general": general, "replies": replies}
    claims = report_claims.claims(pipeline(tmp_path, {"base": base, "r1-zero": zero}, answers, **more))
    assert len(claims) == 7 and not any(claim.holds for claim in claims)
    assert claims[-1].shown == "R1-Zero: 50.0% by one answer, 50.0% by maj@2: +0.0 points [0.0, 0.0]"


def test_the_majority_must_beat_one_answer_significantly(tmp_path):
    tests = {"r1-zero": {"pass@1": 0.6, "maj@3": 0.8, "maj@2": 0.6}}
    for grid, shown, holds in (
        ([[1, 1, 0]] * 12, "+33.3 points [33.3, 33.3]", True),  # ⅔ right, of which the majority makes 1
        ([[1, 1, 0]] * 2 + [[1, 0, 0]], "+11.1 points [-33.3, 33.3]", False),
    ):
        claim = report_claims.claims(pipeline(tmp_path, tests, {"r1-zero": grid}))[-1]
        assert claim.shown == f"R1-Zero: 60.0% by one answer, 80.0% by maj@3: {shown}" and claim.holds is holds


def test_more_checks_must_be_significant(tmp_path):
    tests = {"base": {"pass@1": 1.0, "checks": 2.0}, "r1-zero": {"pass@1": 1.0, "checks": 3.0}}
    answers = {"base": [[1]] * 9, "r1-zero": [[1]] * 9}
    for checked, shown, holds in (({"base": 2, "r1-zero": 3}, "+1.00 [1.00, 1.00]", True),
                                  ({"base": 2, "r1-zero": 2}, "+0.00 [0.00, 0.00]", False)):  # fmt: skip
        run = pipeline(tmp_path, tests, answers, checked=checked)
        claim = next(c for c in report_claims.claims(run) if "Checking" in c.text)
        assert claim.shown == f"2.00 → 3.00 explicit checks per answer: {shown}" and claim.holds is holds


def test_claims_that_need_a_task_which_is_gone_are_left_out(tmp_path):
    run = pipeline(tmp_path, {"r1-zero": {"pass@1": 0.6, "maj@3": 0.8}}, {"r1-zero": [[1, 1, 0]]})
    run.answers["r1-zero"].settings["task"] = "gone.py"
    assert not [c for c in report_claims.claims(run) if "majority" in c.text]


OWN = """
from minir1.tasks import Problem, Verdict
def problems(split, data=None):
    return [Problem(f"say {n}", "x", extra={"checks": n}) for n in range(8)]
def verify(problem, text):
    return Verdict("right", {})
def final(problem, text):
    return text[problem.extra["checks"]:]
def behaviour(problem, text):
    return {"checks": problem.extra["checks"]}
"""


def test_claims_see_the_whole_problem_of_a_task(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    tests = {"base": {"checks": 4.0}, "r1-zero": {"checks": 4.0, "pass@1": 0.7, "maj@3": 1.0}}
    run = pipeline(tmp_path, tests, dict.fromkeys(tests, [[1, 1, 0]] * 4))
    asked = {p: (f"say {2 * p}", "x") for p in range(4)}  # every second problem
    settings = {"task": str(tmp_path / "own.py"), "split": "test", "problems": 4}
    run = run._replace(answers={k: v._replace(settings=settings, asked=asked) for k, v in run.answers.items()})
    shown = [claim.shown for claim in report_claims.claims(run)]
    assert "4.00 → 4.00 explicit checks per answer: +0.00 [0.00, 0.00]" in shown
    assert shown[-1] == "R1-Zero: 70.0% by one answer, 100.0% by maj@3: +33.3 points [33.3, 33.3]"
    (tmp_path / "own.py").write_text(OWN.replace("say", "tell"))  # other problems now
    assert not [c for c in report_claims.claims(run) if "majority" in c.text or "Checking" in c.text]


def test_preferences_are_those_of_the_verifier(built, tmp_path):
    run = report_run.read(built)
    assert run.general["sft-2"]["preference"] == pytest.approx(0.74)
    claim = next(c for c in report_claims.claims(run) if "prefer" in c.text)
    assert claim.holds and claim.shown.startswith(
        "preference 0.74 [0.73, 0.75] → 0.77 [0.76, 0.78]: +0.03 [0.03, 0.03], paired; the reward model agrees"
    )
    assert math.isnan(report_claims.preference([Answer("", 1, False, True, True)]))


def test_the_cost_of_the_language_reward_stands_beside_it(tmp_path):
    run = pipeline(tmp_path, {"r1-zero": {"language_consistency": 0.7}, "rl-1": {"language_consistency": 0.99}},
                   {"r1-zero": [[1, 1]] * 30, "rl-1": [[1, 0]] * 30})  # fmt: skip
    claim = next(c for c in report_claims.claims(run) if "cold start" in c.text)
    assert claim.shown == "0.700 → 0.990; accuracy -50.0 points [-50.0, -50.0]" and not claim.holds


# ---- what is absent, empty or damaged ----------------------------------------------------------


def test_a_run_with_base_and_r1_zero_alone_has_a_page(tmp_path):
    path = build(tmp_path / "short", ("base", "r1-zero"), ("base", "r1-zero"))
    report.write(path, measure=False)
    text = html_of(path)
    assert "gain/r1-zero" in numbers(path) and "gain/final" not in numbers(path)
    for absent in ("SFT", "RL 1", "RL 2", "Cold start", "Rejection", "final model", "Reward model"):
        assert absent not in Seen(text).text
    drawn = {file.stem for file in (path / "figures").glob("*.png")}
    assert drawn == (FIGURES - {"sft_loss", "loss_and_reward"}) | OF_THE_MODEL and "SFT loss" not in text


def test_a_stage_without_a_result_is_not_there_and_neither_is_distillation(copy, undrawn):
    (copy / "rl-2" / "result.json").unlink()
    for part in ("test", "general"):
        shutil.rmtree(copy / part / "rl-2")
    (copy / "distill").mkdir()
    (copy / "distill" / "result.json").write_text('{"seconds": 3}')
    report.write(copy, measure=False)
    text = Seen(html_of(copy)).text
    assert "The final model, SFT 2," in text and "RL 2" not in text and "istill" not in text


def test_a_run_that_was_not_tested_has_a_page(tmp_path):
    path = build(tmp_path / "early", ("base", "r1-zero", "cold-start"), (), checkpoint=False)
    report.write(path)
    assert numbers(path) == {}
    text = Seen(html_of(path)).text
    assert "No stage of this run has been tested yet." in text and "Claims" not in text and "Quality" not in text
    assert {file.stem for file in (path / "figures").glob("*.png")} == {"rl_reward", "timeline"}


def test_empty_metrics_and_nan_are_left_out(copy):
    for name in ("r1-zero", "sft-1"):
        (copy / name / "metrics.jsonl").write_text("")
    rows = read_metrics(copy / "rl-1")
    for row in rows[::2]:
        row["train/reward"] = None
    (copy / "rl-1" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]) + '{"step": 60')
    put(copy / "test" / "base" / "result.json", tidiness=float("nan"), checks=None, repetition=float("inf"))
    put(copy / "sft-2" / "result.json", **{"seconds/sft": None})
    report.write(copy, measure=False)
    text = Seen(html_of(copy)).text
    assert not re.search(r"\b(nan|inf|None)\b", text) and "Checking grows" not in text
    row = next(line for line in (copy / "report.md").read_text().splitlines() if line.startswith("| tidiness"))
    assert row == "| tidiness | - | 0.300 | 0.950 | 0.970 | 0.970 | 0.990 |"


def test_what_a_file_lacks_is_left_out(copy, undrawn):
    """No accuracy, no epochs, no kind of puzzle, and at last no answers at all."""
    for name in ("base", "r1-zero"):
        put(copy / "test" / name / "result.json", **{"pass@1": None})
    put(copy / "rl-1" / "config.json", epochs=None)
    files = sorted((copy / "test").glob("*/answers.jsonl"))
    for file in files:
        head, *rows = map(json.loads, file.read_text().splitlines())
        for row in rows:
            del row["subject"]
        file.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    report.write(copy, measure=False)
    assert numbers(copy)["claims/1"] == 1.0 and "Question" in (copy / "report.md").read_text()
    for file in files:
        file.write_text(file.read_text().partition("\n")[0] + "\n")
    report.write(copy, measure=False)
    assert "Question" not in (copy / "report.md").read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match="is no run of experiments/r1.py: expected stages in it such as"):
            report.write(folder)
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^out = .*file is a file: choose a folder$"):
        report.Config(tmp_path, out=tmp_path / "file")


def test_a_damaged_file_is_named(copy, undrawn):
    file = copy / "test" / "rl-1" / "answers.jsonl"
    file.write_text(file.read_text().replace('"kind"', '"kin"', 1))
    with pytest.raises(ValueError, match="rl-1/answers.jsonl, line 2"):
        report.write(copy)
    (copy / "sft-1" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="sft-1/result.json is damaged"):
        report.write(copy)


def test_answers_to_other_problems_are_not_compared(copy, undrawn):
    file = copy / "test" / "rl-1" / "answers.jsonl"
    file.write_text(file.read_text().replace(json.dumps(PROBLEMS[3].prompt, ensure_ascii=False), '"other"'))
    with pytest.raises(
        ValueError, match="rl-1/answers.jsonl and .*base/answers.jsonl hold answers to different problems"
    ):
        report.write(copy)


def test_an_old_figure_does_not_stay(copy, monkeypatch):
    monkeypatch.setattr(report_model_figures, "_published", dict)
    (copy / "figures").mkdir()
    (copy / "figures" / "sft_loss.png").write_bytes(b"old")
    for name in ("sft-1", "sft-2"):
        shutil.rmtree(copy / name)
    report.write(copy, measure=False)
    assert not (copy / "figures" / "sft_loss.png").exists()


def test_accuracy_at_a_smaller_budget_counts_the_answers_that_end_by_then():
    answer = lambda tokens, right: Answer("", tokens, False, right, True)
    rows = {0: [answer(10, True), answer(40, True)], 1: [answer(16, True), answer(20, False)]}
    values = report_run.spent(answer_file.Saved({}, {"sampled": rows}, {}, {}))
    assert [values[f"budget/{at}/pass@1"] for at in (16, 32, 40)] == [0.5, 0.5, 0.75]
    assert report_run.spent(answer_file.Saved({}, {}, {}, {})) == {}


def test_what_is_truncated_is_right_at_no_budget_and_what_is_unjudged_counts_in_none():
    answer = lambda tokens, truncated=False, unjudged=False: Answer(
        "", tokens, truncated, not unjudged, True, unjudged=unjudged
    )
    rows = {0: [answer(10), answer(20, truncated=True)], 1: [answer(9), answer(9, unjudged=True)]}
    rows[2] = [answer(64, unjudged=True)]
    values = report_run.spent(answer_file.Saved({}, {"sampled": rows}, {}, {}))
    assert {key: x for key, x in values.items() if key.endswith("pass@1")} == {
        "budget/16/pass@1": 0.75, "budget/20/pass@1": 0.75
    }  # fmt: skip


# ---- openness and the model --------------------------------------------------------------------


def test_openness_is_looked_up(copy, monkeypatch):
    found = {item: (file, there) for item, file, there in report.openness(report_run.read(copy))}
    assert found["weights"] == ("base/checkpoint/step-000010/model.safetensors", True)
    assert found["licence"] == ("LICENSE", True)
    assert found["problems and corpus, generated"] == ("minir1/tasks/world.py", True)
    assert found["fine-tuning data"] == ("cold-start/kept.jsonl and 1 more", True)
    (copy / "base" / "checkpoint" / "step-000010" / "model.safetensors").unlink()
    (copy / "rejection" / "kept.jsonl").unlink()
    (copy / "rl-1" / "config.json").unlink()
    (copy / "test" / "rl-2" / "answers.jsonl").unlink()
    monkeypatch.setattr(report, "ROOT", copy)
    assert not any(there for *_, there in report.openness(report_run.read(copy)))


def test_the_cache_of_all_heads_is_counted_from_the_shape():
    assert report_model_figures.full_cache_values(SMALL) == 2 * 2 * (8 + 8 + 16)
    assert report_model_figures.full_cache_values(dense(dim=32, layers=3, heads=4, kv_heads=2)) == 3 * 4 * 2 * 8


def test_a_decoding_step_is_timed_at_each_length():
    lengths = report.context_lengths(SMALL)
    assert lengths == [16, 64, 256]
    seconds = report.decode_seconds(Transformer(r1_run.sized(64)), lengths, repeats=2)
    assert list(seconds) == lengths and all(0 < second < 5 for second in seconds.values())
    assert not torch.is_inference_mode_enabled()


def test_every_stage_that_is_tested_has_a_label():
    assert set(TESTED) <= report_run.STAGES.keys()


# ---- a student ---------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0.1, -0.1])
def test_what_a_student_learned_joins_the_report(built, tmp_path, monkeypatch, undrawn, low):
    ways = {"texts": 0.5, "rl": 0.3, "teacher": 0.8}
    values = {f"{way}/{key}": ways.get(way, 0.4) for way in report.distill_vs_rl.WAYS for key in ("pass@1", "length")}
    values |= {f"{way}/over_rl": 100 * (ways.get(way, 0.4) - 0.3) for way in report.distill_vs_rl.WAYS}
    values |= {"texts/over_rl_low": 100 * low, "texts/over_rl_high": 30.0, "curve": [[0, 0.1], [1000, 0.3]]}
    values |= {f"{way}/tokens": 900.0 for way in ("rl", "texts", "logits", "on-policy")}
    monkeypatch.setattr(report.distill_vs_rl, "figures", lambda folder: values if folder == tmp_path else {})
    report.write(built, distilled=tmp_path, out=tmp_path / "with", measure=False)
    report.write(built, out=tmp_path / "without", measure=False)
    with_it, without = (numbers(tmp_path / name) for name in ("with", "without"))
    added = with_it.keys() - without.keys()
    assert {with_it[key] for key in added} == {float(low > 0)} and len(added) == 1
    text = (tmp_path / "with" / "report.md").read_text()
    assert "taught 50.0%, by RL 30.0%: +20.0 points" in text
    assert "A small student" in text and "figures/distillation.png" in text
    assert (tmp_path / "with" / "figures" / "distillation.png").stat().st_size > 10_000
    assert "A small student" not in (tmp_path / "without" / "report.md").read_text()
