"""How the small world's people would judge a picture that a model made: utilities from attributes that were read.

Reads no truth file: a taste is a formula. Used by evaluation, never by labels or training.
"""

from __future__ import annotations

import numpy as np

from pipelines.world import people, scene


def judge(pictures: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """Return, per judge, one number per picture: taste:<name> (utility) and fidelity (share of attributes right).

    pictures: uint8 [N, 32, 32, 3].
    """
    wanted = [scene.parse_prompt(p) for p in prompts]
    read = scene.read_attributes(pictures)
    result = {f"taste:{t.name}": t.utility(read, wanted) for t in people.TASTES}
    result["fidelity"] = scene.fidelity(read, wanted)
    return result
