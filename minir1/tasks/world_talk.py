"""The general prompts of the world: `tell cat.`, with no single right answer, and the rule that stands in for people.

An answer names what is true of the topic and closes politely: `small,soft,quick. welcome`. In the thinking the model
recalls what may be said, and says of each whether it is true: `cat,small. yes`.
"""

from __future__ import annotations

import re

from minir1 import rewards
from minir1.tasks import share
from minir1.tasks.world_language import KEY, neutral
from minir1.tasks.world_puzzles import Line, Puzzle

FACTS = {
    "cat": "small soft quick quiet", "dog": "loud quick soft big", "bird": "small quick loud far",
    "fish": "wet cold quick quiet", "horse": "big quick tall loud", "snake": "long quiet cold dry",
    "cow": "big slow soft loud", "sheep": "soft slow quiet dry", "mouse": "small quick quiet dark",
    "bee": "small quick loud sharp", "wolf": "quick loud dark sharp", "bear": "big tall dark loud",
    "deer": "quick tall quiet soft", "duck": "wet loud small slow", "frog": "wet small loud cold",
    "tiger": "big quick loud sharp", "ant": "small slow quiet dark", "whale": "big wet slow long",
    "sun": "hot bright far big", "moon": "cold bright far quiet", "star": "hot bright far small",
    "cloud": "far slow soft wet", "wind": "cold quick loud dry", "fire": "hot bright loud dry",
    "ice": "cold hard bright wet", "rain": "wet cold soft dark", "snow": "cold soft bright quiet",
    "night": "dark cold quiet long", "sea": "big wet loud far", "river": "long wet cold loud",
    "hill": "tall hard big far", "stone": "hard dry slow cold", "sand": "dry hot small slow",
    "tree": "tall hard big slow", "flower": "small soft bright dry", "grass": "small soft long wet",
    "house": "big hard tall dry", "tower": "tall hard far dark", "bridge": "long hard tall dry",
    "road": "long hard dry far", "boat": "slow long wet hard", "lamp": "hot bright small quiet",
    "bell": "loud hard small bright", "drum": "loud hard big dark", "bed": "soft long quiet dry",
    "bread": "soft hot dry small", "tea": "hot wet dark quiet", "salt": "small dry hard bright",
    "knife": "sharp hard bright quick", "needle": "sharp small hard long",
}  # fmt: skip
TRUE = {topic: tuple(facts.split()) for topic, facts in FACTS.items()}
SAYABLE = tuple(dict.fromkeys(fact for facts in TRUE.values() for fact in facts))
ENOUGH = 3  # different facts
ACCEPTABLE = 0.75  # of the rule: where an answer counts as right


def puzzles() -> tuple[Puzzle, ...]:
    """One prompt per topic, in the layout of the puzzles; the reference is a best answer by the rule."""
    listed, shuffled = [], sorted(TRUE, key=lambda topic: share(f"talk {topic}"))
    for i, topic in enumerate(shuffled):
        split = "train" if i < 30 else "validation" if i < 38 else "test"
        listed.append(Puzzle("talk", f"{{tell}}{{{topic}}}.", answer_of(TRUE[topic][:ENOUGH], True), "default", split))
    return tuple(listed)


def answer_of(facts: tuple[str, ...] | list[str], polite: bool) -> str:
    """An answer in neutral text."""
    return ",".join(f"{{{fact}}}" for fact in facts) + "." + ("{welcome}" if polite else "")


def recalled(topic: str, fact: str) -> Line:
    """A line of the thinking."""
    return Line(f"{{{topic}}},{{{fact}}}.", "", fact in TRUE[topic])


def preference(question: str, answer: str, language: str) -> float:
    """What people like, as a rule: 0 … 1, the mean of four parts. question: neutral; answer: as the model wrote it.

        enough      different true facts / 3, at most 1
        true        different true facts / all that is said between commas and full stops
        language    share of the words that are in the language of the question
        polite      1 if the answer ends with the closing word, in either language, and has it once

    An answer without a true fact is worth 0: politeness alone is no help.
    """
    topic = KEY.findall(question)[-1]
    body, polite, after = neutral(answer).strip().partition("{welcome}")
    said = [piece.strip() for piece in re.split("[,.]", body) if piece.strip()]
    right = {piece for piece in said if piece[1:-1] in TRUE[topic]}
    if not right:
        return 0.0
    consistent = rewards.language_consistency(answer, language)
    parts = min(1.0, len(right) / ENOUGH), len(right) / len(said), consistent, bool(polite) and not after.strip()
    return sum(parts) / len(parts)
