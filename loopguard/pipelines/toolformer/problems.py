"""Our own word problems, for where no data file is at hand.

One sentence each, in the form of GSM8K. In some the expression is spelled out before its result, in the others a model
has to read it out of the sentence. A seed gives the same problems everywhere.
"""

from __future__ import annotations

import random

from loopguard.pipelines.toolformer.text import Problem, problem_of

_NAMES = ("Amina", "Boris", "Chen", "Dora", "Emil", "Farah", "Goran", "Hedda", "Imre", "Jasmin", "Kofi", "Lena")
_THINGS = ("beads", "bricks", "candles", "figs", "kites", "maps", "nails", "plums", "ribbons", "stones")
_SPELLED_OUT_SHARE = 0.4
# Sentence, expression, and what is counted. The letters are numbers; `a` is at least `b` where it has to be.
_STORIES = (
    ("{who} has {a} {what} and finds {b} more", "{a}+{b}"),
    ("{who} brings {b} {what} to the {a} on the table", "{a}+{b}"),
    ("{who} had {ab} {what} and lost {b} of them", "{ab}-{b}"),
    ("Of {ab} {what} {who} sells {b}", "{ab}-{b}"),
    ("{who} packs {small} bags with {b} {what} in each", "{small}*{b}"),
    ("For each of {b} guests {who} buys {small} {what}", "{b}*{small}"),
    ("{who} splits {product} {what} evenly over {small} shelves", "{product}/{small}"),
)


def generate(count: int, *, seed: int, name: str = "generated") -> list[Problem]:
    """So many different problems."""
    rng = random.Random(seed)
    answers: dict[str, None] = {}
    while len(answers) < count:
        answers.setdefault(_answer(rng))
    return [
        problem_of("How many are there?", answer, origin=f"{name}:{at}") for at, answer in enumerate(answers, start=1)
    ]


def _answer(rng: random.Random) -> str:
    a, b, small = rng.randint(3, 70), rng.randint(2, 24), rng.randint(2, 12)
    numbers = {"a": a, "b": b, "ab": a + b, "small": small, "product": b * small}
    story, shape = rng.choice(_STORIES)
    what = rng.choice(_THINGS)
    expression = shape.format(**numbers)
    result = {"+": a + b, "-": a, "*": b * small, "/": b}[next(sign for sign in "+-*/" if sign in shape)]
    call = f"<<{expression}={result}>>{result} {what}."
    lead = expression if rng.random() < _SPELLED_OUT_SHARE else f"the {what} now "
    return f"{story.format(who=rng.choice(_NAMES), what=what, **numbers)}, so {lead}= {call}"
