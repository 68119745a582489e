"""Judgements about pairs and votes: pure functions on frames, no torch, no store.

Belongs here: what a label means. Does not belong here: reading and writing (`pipelines.steps`), policies (`curation`).
"""
