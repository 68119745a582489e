"""The small world: pictures of coloured shapes, prompts about them, people with known tastes, raw files in real layouts.

Belongs here: everything that invents data. Does not belong here: anything that reads a store; no other package may
read the truth file that `raw` writes, except evaluation and benchmarks.
"""
