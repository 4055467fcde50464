"""Our own word problems, for where no data file is at hand.

One sentence each, in the form of GSM8K. In some the expression is spelled out before its result; in the others a model
has to read out of the sentence which numbers count, in which order, and what is done to them. A seed gives the same
problems everywhere.
"""

from __future__ import annotations

import random

from loopguard.pipelines.toolformer.text import Problem, problem_of

_NAMES = ("Amina", "Boris", "Chen", "Dora", "Emil", "Farah", "Goran", "Hedda", "Imre", "Jasmin", "Kofi", "Lena")
_THINGS = ("beads", "bricks", "candles", "figs", "kites", "maps", "nails", "plums", "ribbons", "stones")
_SPELLED_OUT_SHARE = 0.4
# Sentence and expression. `ab` is a + b and `few_b` is few * b, so that differences and quotients come out whole.
_STORIES = (
    ("{who} has {a} {what} and finds {b} more", "{a}+{b}"),
    ("{who} brings {b} {what} to the {a} on the table", "{a}+{b}"),
    ("{who} had {ab} {what} and lost {b} of them", "{ab}-{b}"),
    ("Of {ab} {what} {who} sells {b}", "{ab}-{b}"),
    ("{who} packs {few} bags with {b} {what} in each", "{few}*{b}"),
    ("For each of {b} guests {who} buys {few} {what}", "{b}*{few}"),
    ("{who} splits {few_b} {what} evenly over {few} shelves", "{few_b}/{few}"),
    ("In {few} days {who} uses up {few_b} {what}, the same each day", "{few_b}/{few}"),
    ("{who} has {a} {what}, Omar {b} and Pia {few}", "{a}+{b}+{few}"),
    ("{who} opens {few} boxes of {b} {what} and adds {a}", "{few}*{b}+{a}"),
    ("{who} fills {few} jars with {b} {what} and gives {few} back", "{few}*{b}-{few}"),
    ("After {few} days {who} has {a} {what} and {b} new ones", "{a}+{b}"),
    ("On page {few} {who} counts {ab} {what}, of which {a} are old", "{ab}-{a}"),
)


def generate(count: int, *, seed: int, name: str = "generated") -> list[Problem]:
    """So many different problems."""
    rng = random.Random(f"problems/{seed}")  # of a text, since -1 and 1 seed alike
    answers: dict[str, None] = {}
    while len(answers) < count:
        answers.setdefault(_answer(rng))
    return [
        problem_of("How many are there?", answer, origin=f"{name}:{at}") for at, answer in enumerate(answers, start=1)
    ]


def _answer(rng: random.Random) -> str:
    a, b, few = rng.randint(3, 90), rng.randint(2, 40), rng.randint(2, 12)
    numbers = {"a": a, "b": b, "few": few, "ab": a + b, "few_b": few * b}
    story, shape = rng.choice(_STORIES)
    results = {
        "{a}+{b}": a + b,
        "{ab}-{b}": a,
        "{ab}-{a}": b,
        "{few}*{b}": few * b,
        "{b}*{few}": few * b,
        "{few_b}/{few}": b,
        "{a}+{b}+{few}": a + b + few,
        "{few}*{b}+{a}": few * b + a,
        "{few}*{b}-{few}": few * b - few,
    }
    what = rng.choice(_THINGS)
    expression = shape.format(**numbers)
    lead = expression if rng.random() < _SPELLED_OUT_SHARE else f"the {what} now "
    sentence = story.format(who=rng.choice(_NAMES), what=what, **numbers)
    return f"{sentence}, so {lead}= <<{expression}={results[shape]}>>{results[shape]} {what}."
