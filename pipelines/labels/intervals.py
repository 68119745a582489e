"""Shares with 95 % intervals: what several label tables report.

    Wilson (1927):  (p + q/2 +- sqrt(q p (1 - p) + q^2/4)) / (1 + q),  q = 1.96^2 / n
    clusters:       n is divided by the design effect, at least 1
        sum_g C_g / (C_g - 1) sum_c (k_c - p_g n_c)^2  /  sum_g p_g (1 - p_g) n_g^2 / (n_g - 1)
                    k_c of n_c events in cluster c; C_g clusters, n_g events and share p_g of group g

Votes on one prompt are not independent; a share over them is as sure as one over n / design effect independent votes.
Belongs here: intervals of shares. Does not belong here: what is counted.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

_SQUARE = float(ndtri(0.975)) ** 2


def wilson(share: np.ndarray | float, n: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of a share of n independent events; NaN where n is 0."""
    share, n = np.asarray(share, float), np.asarray(n, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = _SQUARE / n
        half = np.sqrt(q * share * (1 - share) + q * q / 4)
        low, high = (share + q / 2 - half) / (1 + q), (share + q / 2 + half) / (1 + q)
    # Rounding can end behind the scale.
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


def design_effect(
    right: np.ndarray, count: np.ndarray, clusters: np.ndarray, groups: np.ndarray | None = None
) -> float:
    """Return the factor by which clusters widen the variance of sum(right) / sum(count), at least 1.

    It is exactly 1 where every event is a cluster of its own.

    Args:
        right, count: events of a row that are counted, and all its events, [N]; clusters: 0 .. C-1, [N].
        groups: 0 .. G-1, [N], each of whole clusters, with shares of their own (people who differ); None: one group.
    """
    k, n = (np.bincount(clusters, v) for v in (right, count))
    of = np.zeros(len(n), np.int64)
    if groups is not None:
        of[clusters] = groups
    k, n, of = k[n > 0], n[n > 0], of[n > 0]
    size, events, hits = (np.bincount(of, v) for v in (np.ones(len(n)), n, k))
    share = np.divide(hits, events, out=np.zeros(len(events)), where=events > 0)
    several = (size > 1) & (events > 1)
    squares = np.bincount(of, (k - share[of] * n) ** 2, minlength=len(size))
    between = (squares[several] * size[several] / (size[several] - 1)).sum()
    within = (share * (1 - share) * events**2)[several] / (events[several] - 1)
    return max(1.0, float(between / within.sum())) if within.sum() > 0 else 1.0


def clustered_share(right: np.ndarray, count: np.ndarray, clusters: np.ndarray) -> tuple[float | None, ...]:
    """Return sum(right) / sum(count) and its interval with clusters.

    None where nothing is counted; no interval of a single cluster, which does not tell how much clusters differ.
    """
    total = float(count.sum())
    if not total:
        return None, None, None
    share = float(right.sum()) / total
    if np.count_nonzero(np.bincount(clusters, count)) < 2:
        return share, None, None
    low, high = wilson(share, total / design_effect(right, count, clusters))
    return share, float(low), float(high)
