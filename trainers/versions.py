"""Versions of the torch steps' programs, readable without torch: a step whose version changes makes its tables again.

Belongs here: one number per step. Does not belong here: anything else.
"""

CACHES = "2"
TRAJECTORIES = "1"
TRAINING = "2"
SAMPLING = "2"
EVALUATION = "2"
