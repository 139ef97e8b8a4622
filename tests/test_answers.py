"""answers.py: which part of a text is its final answer. What a number is, tests/test_gsm8k.py asks."""

import time

import number_gallery
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minir1.rewards import TAGS, answer
from minir1.tasks import Problem
from minir1.tasks.answers import BOXED_INSTRUCTION, MAX_CHARS, asked, boxed, claim, conclusion, sentence

BOXES = {
    "\\boxed{18}": "18", "so $\\boxed{ 18 }$.": "18", "\\boxed {18}": "18", "\\boxed\n{18}": "18", "\\fbox{18}": "18",
    "\\boxed{1} \\boxed{2}": "2", "\\boxed{1} \\fbox{2}": "2", "\\fbox{1} \\boxed{2}": "2", "\\\\boxed{18}": "18",
    "\\boxed{\\frac{1}{\\sqrt{2}}}": "\\frac{1}{\\sqrt{2}}", "\\boxed{\\{1,2\\}}": "\\{1,2\\}", "\\boxed{\\}}": "\\}",
    "\\boxed{\\left\\{x : x > \\frac12\\right\\}}": "\\left\\{x : x > \\frac12\\right\\}",
    "\\boxed{a\\\\{b}}": "a\\\\{b}",
    "\\boxed{18} in \\boxed .": "18", "\\boxed and \\boxed{18}": "18", "\\boxed{18} }}": "18", "{{ \\boxed{18}": "18",
    "\\boxed{1 \\boxed{18}": "18", "\\boxed{18 or \\boxed{19}}": "18 or \\boxed{19}",
    "\\boxed{\\boxed{18}}": "\\boxed{18}",
    "\\boxed{\\text{(B)}}": "\\text{(B)}", "\\boxed{{18}}": "{18}", "\\boxed{a}{b}": "a",
    "\\boxed{18}" + "." * 9999: "18",
    "\\boxed{1}" + "." * 9999 + "\\boxed{18}": "18", f"\\boxed{{{'1' * MAX_CHARS}}}": None, "\\boxed{1}\\boxed{": None,
    "\\boxed{" + "{" * 900 + "x" + "}" * 900 + "}": "{" * 900 + "x" + "}" * 900,
    "": None, "18": None, "boxed{18}": None, "\\boxed": None, "\\boxed 18": None, "\\boxed{": None, "\\boxed{18": None,
    "\\boxed{}": None, "\\boxed{ }": None, "\\boxed{18\\}": None, "\\boxed{1} \\boxed{18": None, "\\boxed(18)": None,
    "\\boxed{1} \\boxed{\\text{18}": None, "\\Boxed{18}": None, "\\unboxed{18}": None, "\\boxed}18{": None,
}  # fmt: skip


@pytest.mark.parametrize("text", BOXES, ids=lambda text: text[:60])
def test_the_last_box(text):
    assert boxed(text) == BOXES[text]
    if text.partition("{")[1] and "boxed" in text:
        assert BOXES[text] is None or claim(text) == claim(f"The answer is 5.\n#### 6\n{text}") == BOXES[text]


CLAIMS = {
    # ####
    "#### 18": "18", "work\n#### 18\nmore": "18", "#### 1\n#### 18": "18", "#### 1 #### 18": "18", "####18": "18",
    "the answer is 3\n#### 18": "18", "#### 42\n" + "x" * 400: "42", "#### x = 18 clips": "x = 18 clips", "#### B": "B",
    "#### eighteen": "eighteen", "#### Step 2\nThe answer is 18.": "18", "#### **Final Answer**\n\n18": "18",
    # statements
    "The answer is 18.": "18", "the final answer is: 18\nDone": "18", "The answer is 1. The answer is 18. OK.": "18",
    "**Answer:** 73": "73", "**Answer**: 73": "73", "**Answer: 73**": "73", "Answer: 73": "73", "ANSWER: 73": "73",
    "Answer = 73": "73", "The answer is **73**.": "73", "The answer is **73** clips.": "73 clips",
    "The answer is: 73": "73",
    "Final Answer: The final answer is $72$. I hope it is correct.": "$72$", "### Final Answer\n\\(72\\)": "\\(72\\)",
    "**Final Answer**\n\n**72**": "72", "Final answer:\n$$\n72\n$$": "72",
    "The final answer is:\n\\[\n72\n\\]\nDone.": "72",
    "The answer to the question is 72 clips.": "72 clips", "the answer for all of us would be 72": "72",
    "The correct answer is (B). It is hot.": "(B)", "The answer is B": "B", "So the answer was 72!": "72!",
    "The answer is $29.00.": "$29.00", "answer is 3 5": "5", "answer is 1 1/2": "1 1/2", "answer is 8 000": "8 000",
    "The answer is \\frac{1}{2}.": "\\frac{1}{2}", "The answer is 18 or 19.": "18 or 19",
    "The answer is not 18.": "not 18",
    "<think>The answer is 3.</think>The answer is 18.": "18", "thinking 3 #### 4</think>\n#### 18": "18",
    # tags
    "<think>x</think><answer>18</answer>": "18", "x</think> so <answer> 18 </answer> #### 5": "18",
    "<think>x</think><answer>\\boxed{18}</answer>": "\\boxed{18}",
    "<think>\\boxed{1}</think><answer>a b</answer>": "a b",
    # in no other place
    "": None, "18": None, "It is 18.": None, "the answers 18": None, "The answer isn't 18": None, "An answer: ": None,
    "The answer is": None, "The answer is 18?": None, "The answer is \n\n": None, "#### ": None, "18\n####": None,
    "<think>The answer is 18": None, "<think>#### 18</think>": None, "x</think><think>#### 18": None, "<think>": None,
    "<answer>#### 18": None, "#### 18</answer>": None, "<think>x</think><answer> </answer>": None,
    "<think>x</think><answer>1</answer><answer>1</answer>": None, "<think><answer>18</answer></think>": None,
    "#### " + "1" * (MAX_CHARS + 1): None, "the answer is " + "1" * (MAX_CHARS + 1): None,
}  # fmt: skip


@pytest.mark.parametrize("text", CLAIMS, ids=lambda text: text[:60])
def test_claims(text):
    assert claim(text) == CLAIMS[text]


def test_the_order_of_claims():
    parts = ["The answer is 3.", "#### 2", "\\boxed{1}"]
    assert claim("\n".join(parts)) == claim("\n".join(reversed(parts))) == "1"
    assert claim("#### 2\nThe answer is 3.") == claim("The answer is 3.\n#### 2") == "2"
    assert claim("<think>x</think><answer>0</answer>" + "\n".join(parts)) == "0"


def test_a_task_may_look_elsewhere_where_nothing_is_claimed():
    assert claim("<think>1</think> so 18", otherwise=lambda said: said) == " so 18"
    assert claim("18", otherwise=lambda said: None) is None
    for text in (
        "\\boxed{18",
        "\\boxed{}",
        "The answer is",
        "18\n####",
        "<think>18",
        "<answer>18",
        "The answer is 18?",
    ):
        assert claim(text, otherwise=lambda said: "18") is None, text


def test_the_gallery_claims_nothing_of_its_thinking():
    """In a text with closed thinking, the claim does not change with the thinking."""
    for texts in number_gallery.wrong("72", "18").values():
        for text in texts:
            if not any(tag in text for tag in TAGS):
                assert claim(f"<think>\\boxed{{5}} #### 5\nThe answer is 5.</think>{text}") == claim(text)
                assert claim(f"<think>x {text}") is None and claim(f"<think>{text}</think>") is None


def test_conclusions():
    assert conclusion("a") == "a" and conclusion("a</think>b") == conclusion("<think>a</think>b") == "b"
    assert conclusion("<think>a") is None and conclusion("<think>a</think>b<think>c") is None


def test_sentences():
    for text, first in {
        "18. That is all": "18", "1.5 m": "1.5 m", "18\n19": "18", "**18** clips.": "18 clips", "18!": "18!",
        "ten! Yes": "ten",
        "18": "18", "18 (all).": "18 (all)", "**18**.": "18", "18.** Yes": "18", "18?": "", "2**3**2": "2**3**2",
        "": "",
    }.items():  # fmt: skip
        assert sentence(text) == first


def test_variants_of_a_prompt():
    problems = [Problem("How many?", "18", solution="x"), Problem("Why?", "0")]
    assert asked(problems, "plain") == problems
    assert [p.prompt for p in asked(iter(problems), "boxed")] == [
        f"{p.prompt}\n\n{BOXED_INSTRUCTION}" for p in problems
    ]
    assert asked(problems, "boxed")[0].solution == "x" and "\\boxed{}" in BOXED_INSTRUCTION


PIECES = [*TAGS, "####", "\\boxed", "\\fbox{", "{", "}", "\\", "the answer is", "Answer:", "final answer", "\n", " ",
          "**",
          "$$", "\\[", "\\]", ".", "18", "?", "to "]  # fmt: skip
pieces = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.one_of(st.text(), pieces))
def test_any_text(text):
    said = claim(text)
    assert said is None or (
        said == said.strip()
        and 0 < len(said) <= MAX_CHARS
        and any(said in form for form in (text.replace("\\fbox", "\\boxed"), text.replace("**", "")))
    )
    if "<answer>" in text:
        assert said == answer(text)
    inside = boxed(text)
    assert inside is None or f"{inside}" in text.replace("\\fbox", "\\boxed")


@given(
    st.recursive(
        st.sampled_from(["x", "\\frac", "\\{", "\\}", "\\\\", "^2 ", ""]),
        lambda inner: st.one_of(inner.map("{{{}}}".format), st.lists(inner, min_size=2, max_size=3).map("".join)),
        max_leaves=20,
    ),
    pieces,
)
def test_balanced_braces_come_back(content, before):
    """Whatever is balanced is read whole, after any text."""
    box = f"\\boxed{{{content}}}"
    before = before.replace("\\", "/")
    assert boxed(before + box) == (content.strip() or None)
    assert boxed(f"{before}{box} and {{ \\boxed ") == boxed(before + box)
    assert boxed(before + box[:-1]) is None


@pytest.mark.parametrize(
    "piece", [*PIECES, "\\boxed{", "\\boxed ", "\\boxed{1}", "#### ", "#### ab\n", "answer to ", "a", "1 ", "answer **"]
)
def test_a_text_of_1_mb_takes_less_than_50_ms(piece):
    long = piece * (1_000_000 // len(piece))
    for text in (
        long,
        "\\boxed{" + long,
        "#### " + long,
        "the answer is " + long,
        long + "#### 5",
        "answer: $$" + long,
        "answer to " * 12 + long,
        "answer" + " " * 1_000_000 + long[:9],
    ):

        def seconds():
            start = time.thread_time()  # of the processor: other programs may take it
            claim(text)
            return time.thread_time() - start

        assert any(seconds() < 0.05 for _ in range(20))
