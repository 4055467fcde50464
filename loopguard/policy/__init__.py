"""Guard policies, one module for each question.

    from loopguard.policy.load import load
    loaded = load(Path("policies/default.yaml"))     # PolicyError names every problem with its line and column

What may a file say? `schema`, with `units` and `hosts`. What may none ever say? `forbidden`. How is it read, and what
is wrong with it? `source`, `explain`, `findings`, `lint`, all behind `load`. What follows from it for a call?
`decide`. Is another one tighter? `diff`.

pydantic and ruamel.yaml stay in here.
"""
