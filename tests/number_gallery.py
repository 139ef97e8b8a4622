"""What models write around a number, for tests of verifiers: right ones, and adversarial ones that must not be right.

{n} is the number of the reference, {m} another one. A claim is put into each of CLAIMED; a text stands for itself.
"""

CLAIMED = {
    "boxed": "We add.\nSo the result is $\\boxed{{{}}}$.",
    "marked": "We add.\n#### {}",
    "stated": "We add. The answer is {}",
    "headed": "We add.\n\n**Final Answer:** {}",
    "tagged": "<think>We add.</think> <answer>{}</answer>",
    "bare": "We add.\n{}",
}

RIGHT_CLAIMS = [
    "{n}", "{n}.", "{n}.0", "{n}.00", "0{n}", "+{n}", "${n}", "${n}.00", "\\${n}", "€{n}", "${n}$", "{n}%",
    "{n}\\%", "{n} %",
    "**{n}**", "**{n}.**", "\\text{{{n}}}", "\\textbf{{{n}}}", "\\mathbf{{{n}}}", "({n})", "\\({n}\\)",
    "{n} clips", "{n} miles per hour", "{n}kg", "{n}\\text{{ clips}}", "{n} \\text{{ cm}}^2", "{n} ft^2", "{n} m²",
    "{n}^\\circ", "{n}^{{\\circ}}", "{n}°", "{n}\\,\\text{{ft}}", "x = {n}", "= {n}", "x={n}", "m+n = {n}",
    "n = {n}.", "20 + 52 = {n}",
    "20 \\times 3 = {n}", "2 x 30 = ${n}", "She sold {n} clips in total", "A total of **{n}** clips", "{n}, altogether",
    "{n} clips in April and May", "{n} clips for all three weeks", "\\frac{{{n}}}{{1}}", "{n}/1", "\\dfrac{{{n}}}1",
    "**{n} clips**", "{n} dollars, in all", "${n} per day", "{n}/day", "Total: {n}", "Total = {n} clips",
    "{n} square feet",
    "A grand total of US${n}", "(E) {n}", "\\textbf{{(E) }}{n}", "{n} quarters", "at least {n}", "{n} km/h",
]  # fmt: skip
RIGHT_TEXTS = [
    "The total is {n} clips, altogether.", "answer is 3 5 {n}", "$\\boxed{{{n}}}$", "\\boxed {{{n}}}", "\\fbox{{{n}}}",
    "\\boxed{{\\boxed{{{n}}}}}", "\\boxed{{\\text{{{n}}}}}", "\\boxed{{{n}\\text{{ clips}}}}",
    "\\[\n\\boxed{{{n}}}\n\\]",
    "\\boxed{{{n}}} and so \\boxed{{{n}}}", "\\boxed{{{m}}}? No: \\boxed{{{n}}}", "\\boxed{{{n}}} is in the \\boxed .",
    "Put it into \\boxed and then: \\boxed{{{n}}}", "\\boxed{{{m} and then \\boxed{{{n}}}", "\\\\boxed{{{n}}}",
    "#### {n}\nThat is all." + " It was easy to see." * 20, "#### {n} and so on" + " and on" * 60, "#### {m}\n#### {n}",
    "#### Final Answer\n\n{n}", "#### Step 1\n20 + 52\n\n#### Step 2\nThe answer is {n}.",
    "Final Answer: The final answer is ${n}$. I hope it is correct.", "The final answer is:\n\\[\n{n}\n\\]",
    "### Final Answer\n\\({n}\\)", "**Final Answer**\n\n**{n}**", "**Final Answer:**\n\n$$\n{n}\n$$", "**Answer**: {n}",
    "**Answer: {n}**", "ANSWER: {n}", "Answer = {n}", "The answer to the question is {n}.",
    "So the answer would be {n} clips!\n",
    "The answer is {m}. Wait, no. The answer is {n}.", "the answer is {n}\nthe answer is {n}", "Answer:\n{n}\n",
    "20 + 52 = {n}", "She sold 20 + 52 = **{n}** clips.", "So 2x = 144 and x = {n}.",
    "{m} is too much.\nIt is {n} clips.",
    "First {m}, then 3, so {n} in total.", "Each of the 3 pays.\n\\[ 20 + 52 = {n} \\]", "<think>#### {m}</think>{n}",
    "<think>\\boxed{{{m}}}</think>The answer is \\boxed{{{n}}}", "hm {m}</think>\n#### {n}", "It is `{n}`",
    "The answer is {n} because half of 48 is 24 and 48 + 24 = 72.", "The answer is {n} because 5^2 = 25.",
    "The answer is {n}, since she doesn't sell the rest.", "The answer is {n} because three eggs are eaten.",
    "The answer is {n}, since 24 is half of 48.", "<think>x</think><answer>{n}, given two dozen eggs</answer>",
    "The answer is {n}, since she sold 48 in April.", "The answer is {n} because 20 + 52 = {n}", "#### {n} (20 + 52)",
    "\\boxed{{{n} dollars for 45 hours of work}}", "<think>x</think><answer>{n} miles in 3 days</answer>",
    "<think>x</think><answer>\\boxed{{{n}}}</answer>", "<think>x</think><answer>#### {n}</answer>",
    "<think>{m}\n{m}</think>\n<answer>\n{n}\n</answer>\nDone", "<think>x</think> #### {m} <answer>{n}</answer>",
]  # fmt: skip

WRONG_CLAIMS = {  # kind -> claims
    "another number": ["{m}", "{n}1", "1{n}", "{n}.5", "{n}{n}", "0.{n}", ".{n}", "{m}.00", "{n}0"],
    "sign": ["-{n}", "- {n}", "\u2212{n}", "-${n}", "\\$-{n}", "negative {n}", "minus {n}", "−\\frac{{{n}}}{{1}}",
             "\\text{{negative }} {n}"],
    "hedge": ["{n} or {m}", "{m} or {n}", "either {m} or {n}", "{m} / {n}", "{n} / {m}", "{n}/{m}", "{n}, {m}",
              "{m}, {n}",
              "between {m} and {n}", "{m} (or {n})", "{n} (or {m})", "{m} and {n}", "{m} & {n}", "{m}; {n}", "{m}|{n}",
              "{m}-{n}", "{m} - {n}", "{m} to {n}", "{m}–{n}", "{n} ({m})", "{m} ({n})", "{m} \\text{{ or }} {n}",
              "{m} \\lor {n}", "\\{{{m}, {n}\\}}", "{m}, maybe {n}", "{m}, possibly {n}", "{m} clips or {n} clips",
              "{m} vs {n}", "{n} or so", "{n} or nineteen", "maybe {n}", "perhaps {n}", "{m},{n}", "{m} , {n} , 5",
              "{m} = {n}", "{n} in case 1, {m} in case 2, 3 in case 3", "{n} for x and {m} for y",
              "{n} for A, {m} for B", "{n} as well as {m}", "{n} because I guess, or {m}",
              "{n} since it is {n} or {m}", "{n} clips for Ann; {m} clips for Bob"],
    "denied": ["not {n}", "{n} is wrong", "definitely not {n}", "isn't {n}", "anything but {n}", "never {n}", "{n}? No",
               "{n} is incorrect", "{n} is not it", "no {n}", "{n} is false", "neither {n}", "nothing", "unknown"],
    "words that change": ["{n} dozen", "{n} hundred", "{n} thousand", "{n} million", "{n} billion", "{n} squared",
                          "{n} cubed", "half of {n}", "twice {n}", "double {n}", "{n} and a half", "{n} halves",
                          "{n} tenths", "{n} k", "{n} grand", "{n} point five", "root of {n}", "square root of {n}",
                          "a third of {n}", "a tenth of {n}", "{n} factorial", "{n} mod 5", "{n} percent of 8",
                          "more than {n}", "less than {n}", "about {n}", "approximately {n}", "nearly {n}", "over {n}",
                          "{n} in base 8", "{n} pi", "log {n}", "the reciprocal of {n}", "the square of {n}", "{n}th",
                          "{n}\\text{{ million}}", "{n} \\text{{ dozen}}", "{n} lakh", "{n} score",
                          "log({n})", "a quarter of {n}", "{n} for a half, {m} or so", "one in {n} or {m}"],
    "operator": ["{n}+1", "1+{n}", "{n} - 1", "1000+{n}", "{n}*2", "2*{n}", "2 \\times {n}", "{n} \\cdot 2",
                 "{n}^2", "2^{n}",
                 "{n}^{{99}}", "{n}!", "\\sqrt{{{n}}}", "\\frac{{{n}}}{{2}}", "\\frac{n}3", "1/{n}", "{n}/2",
                 "1/2^{n}", "{n}/0",
                 "\\pm{n}", "±{n}", "~{n}", "\\approx {n}", "> {n}", "x > {n}", "\\ge {n}", "< {n}", "{n} x 2",
                 "{n} \\div 2",
                 "|{n}|", "\\neq {n}", "{n} + x", "2{n}x", "{n}x", "{n}\\pi", "{n}i", "{n} \\pmod{{5}}",
                 "{n}\\sqrt2", "{n}e3"],
    "equation": ["3x-y+{n}=0", "x + {n} = 5", "x+5={n}", "2x = {n}", "x^2 = {n}", "{n} = {m}", "n={n},{m}",
                 "{n} = 2x - 1"],
    "structure": ["({m}, {n})", "({n},\\infty)", "[{n}, {m}]", "[{m},{n}]", "\\left({m},{n}\\right)", "{n}:00",
                  "{m}:{n}",
                  "1:{n}", "{{{m},{n}}}", "(-\\infty, {n}]", "\\begin{{pmatrix}} {n} \\\\ {m} \\end{{pmatrix}}",
                  "{n}.5.2",
                  "x \\in [{n}, {m}]", "{n}_{{8}}", "0x{n}", "{n}'{m}", "A{n}", "f({n}) = {m}", "{n} R 1",
                  "{n} remainder 1"],
    "grouping": ["1,{n}", "{n},0", "{n},{n}", ",{n},5", "1_{n}", "{n}.000,5", "{n},00"],
    "digits of other scripts": ["٧٢", "７２", "⁷²", "Ⅷ", "{n}²", "{n}\u0660", "{n}½", "七十二"],
    "words": ["seventy-two", "twelve hundred", "LXXII", "{n} nineteen", "twenty {n}", "{n} and nineteen"],
    "notation": ["{n}e2", "{n}E-1", "{n}ab", "{n}xy", "{n}a", "{n}‰", "{n}?", "{n} (?)", "{n} tens", "{n} bn", "{n}d",
                 "inf", "nan", "__import__('os')", "{n}\\", "\\{n}", "{n}..5", "..{n}.."],
    "lists of guesses": [" ".join(map(str, range(100))), ", ".join(map(str, range(100))), "{n} " * 9 + "{m}",
                         "/".join(map(str, range(60, 80))), " or ".join(map(str, range(60, 80))), "{m}\n{n}\n{m}"],
    "long": ["9" * 100, "{n}" + "0" * 100, "0" * 5000 + "{n}", "{n}" + ",000" * 30],
}  # fmt: skip
WRONG_TEXTS = {  # kind -> texts
    "a later claim": ["\\boxed{{{n}}} no, \\boxed{{{m}}}", "#### {n}\n#### {m}", "#### {n} #### {m}",
                      "The answer is {n}. The answer is {m}.", "\\boxed{{{n} or \\boxed{{{m}}}}}"],
    "a stronger claim": ["\\boxed{{{m}}}\n#### {n}", "#### {m}\nThe answer is {n}.", "The answer is {m}.\n{n}",
                         "\\boxed{{{m}}} The final answer is {n}.", "<answer>{m}</answer> \\boxed{{{n}}}",
                         "<think>x</think><answer>{m}</answer> #### {n}", "<think>x</think><answer>x</answer> {n}"],
    "unterminated": ["\\boxed{{{n}", "\\boxed{{{n}}} \\boxed{{{n}", "\\boxed{{{n}}} and \\boxed{{",
                     "so {n} \\boxed{{\\}}",
                     "{n}\n\\boxed{{\\text{{{n}}}", "<think>x</think><answer>{n}", "<answer>{n}</answer"],
    "empty claim": ["{n} \\boxed{{}}", "{n} \\boxed{{ }}", "{n}\n####", "{n}. The answer is", "{n}. Answer:", "",
                    " ", "\n",
                    "<think>{n}</think><answer></answer>", "<think>{n}</think><answer> \n</answer>"],
    "thinking": ["<think>{n}", "<think>#### {n}", "<think>\\boxed{{{n}}}", "<think>The answer is {n}.",
                 "<think>{n}</think>",
                 "<think>#### {n}</think>", "<think>\\boxed{{{n}}}</think>I am done", "a</think><think>#### {n}",
                 "<think><answer>{n}</answer></think>", "x<answer>{n}</answer></think>", "<think>{n}</think> No idea.",
                 "<think>x<answer>{n}</answer>", "<think><answer>{n}</answer></think><answer>{m}</answer>",
                 "<think>x</think>{n}<think>hm", "{n}<think>"],
    "tags": ["<think>x</think><answer>{n}</answer><answer>{n}</answer>",
             "<think>x</think><answer>{n}</answer></answer>",
             "<think>x</think><answer>{m}</answer><answer>{n}</answer>", "<answer>{n}</answer>", "#### {n}</answer>",
             "<answer>#### {n}", "<think>x</think></answer>{n}<answer>", "<answer>{n}</answer><think>x</think>"],
    "no claim, no statement": ["I tried {n} + 1", "not {n}", "{n} or {m}", "Is it {n}? It is not", "{m}, {n}",
                               "{n}\nor {m}",
                               "She has {n} dozen.",
                               "{n} for me or {m} for you", "We have {n} = 20 + 52",
                               "x > {n}", "They are {m} and {n}"],
    "statements that deny": ["The answer is not {n}.", "the answer isn't\n{n} or so",
                             "The answer is certainly not:\n{n} or {m}",
                             "The answer is unknown. {n}", "#### none\n", "\\boxed{{none}} {n}", "{n}\n#### not sure"],
}  # fmt: skip


def right(n: str, m: str) -> list[str]:
    texts = [form.format(claim.format(n=n, m=m)) for form in CLAIMED.values() for claim in RIGHT_CLAIMS]
    return texts + [text.format(n=n, m=m) for text in RIGHT_TEXTS]


def wrong(n: str, m: str) -> dict[str, list[str]]:
    """kind -> texts, none of which answers n. m: another number, which is no half, double or the like of n."""
    listed = {kind: [text.format(n=n, m=m) for text in texts] for kind, texts in WRONG_TEXTS.items()}
    for kind, claims in WRONG_CLAIMS.items():
        listed[kind] = [form.format(claim.format(n=n, m=m)) for form in CLAIMED.values() for claim in claims]
    return listed
