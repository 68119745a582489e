"""Shares with 95 % intervals: what several label tables report.

    Wilson (1927):  (p + q/2 +- sqrt(q p (1 - p) + q^2/4)) / (1 + q),  q = 1.96^2 / n
    clusters:       n is divided by the design effect  sum_c (k_c - p n_c)^2 / (n p (1 - p)) * C / (C - 1), at least 1

Votes on one prompt are not independent; a share over them is as sure as one over n / design effect independent votes.
Belongs here: intervals of shares. Does not belong here: what is counted.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

_SQUARE = float(norm.ppf(0.975)) ** 2


def wilson(share: np.ndarray | float, n: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of a share of n independent events; NaN where n is 0."""
    share, n = np.asarray(share, float), np.asarray(n, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = _SQUARE / n
        half = np.sqrt(q * share * (1 - share) + q * q / 4)
        return (share + q / 2 - half) / (1 + q), (share + q / 2 + half) / (1 + q)


def design_effect(right: np.ndarray, count: np.ndarray, clusters: np.ndarray) -> float:
    """Return the factor by which clusters widen the variance of sum(right) / sum(count), at least 1.

    Args:
        right, count: events of a row that are counted, and all its events, [N]; clusters: 0 .. C-1, [N].
    """
    k, n = (np.bincount(clusters, v) for v in (right, count))
    k, n = k[n > 0], n[n > 0]
    total = n.sum()
    share = k.sum() / total if total else 0.0
    if len(n) < 2 or not 0 < share < 1:
        return 1.0
    within = ((k - share * n) ** 2).sum() * len(n) / (len(n) - 1)
    return max(1.0, float(within / (total * share * (1 - share))))


def clustered_share(right: np.ndarray, count: np.ndarray, clusters: np.ndarray) -> tuple[float | None, ...]:
    """Return sum(right) / sum(count) and its interval with clusters; three None where nothing is counted. See above."""
    total = float(count.sum())
    if not total:
        return None, None, None
    share = float(right.sum()) / total
    low, high = wilson(share, total / design_effect(right, count, clusters))
    return share, float(low), float(high)
