"""Renderers with known faults, annotators with known tastes, and how they vote.

    U_taste(picture, prompt) = FIDELITY * fidelity + b * B + s * S + w * W

with B, S, W the brightness, saturation and warmth scaled to [-1, 1]. The minority opposes the majority on brightness
and saturation and agrees on warmth and fidelity. The population's mean utility weighs the tastes by their shares.

Belongs here: the mathematics of people. Does not belong here: pictures (`scene`), files (`raw`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from pipelines.world import scene


@dataclass(frozen=True)
class Taste:
    """Weights of a utility; the unit is that of the annotators' temperature."""

    name: str
    brightness: float
    saturation: float
    warmth: float
    fidelity: float = 3.5

    def utility(self, scenes: scene.Scenes, wanted: list[scene.Wanted]) -> np.ndarray:
        """Return U for each scene and the prompt at the same position, [N]."""
        low, high = scene.BRIGHTNESS_RANGE
        b = np.clip((scenes.brightness - low) / (high - low) * 2 - 1, -1.25, 1.25)
        low, high = scene.SATURATION_RANGE
        s = np.clip((scenes.saturation - low) / (high - low) * 2 - 1, -1.25, 1.25)
        return (
            self.fidelity * scene.fidelity(scenes, wanted)
            + self.brightness * b
            + self.saturation * s
            + self.warmth * scenes.warmth
        )


MAJORITY = Taste("majority", brightness=-1.2, saturation=1.0, warmth=0.4)
MINORITY = Taste("minority", brightness=1.2, saturation=-1.0, warmth=0.4)
TASTES = (MAJORITY, MINORITY)


def mean_taste(minority_share: float) -> Taste:
    """Return the taste whose utility is the population's mean."""
    m = minority_share
    return Taste(
        "mean",
        (1 - m) * MAJORITY.brightness + m * MINORITY.brightness,
        (1 - m) * MAJORITY.saturation + m * MINORITY.saturation,
        (1 - m) * MAJORITY.warmth + m * MINORITY.warmth,
    )


@dataclass(frozen=True)
class Renderer:
    """A 'model' that makes the pictures people compare: style as Beta(a, b) of brightness and saturation, and faults."""

    name: str
    error_rate: float
    brightness: tuple[float, float]
    saturation: tuple[float, float]
    grain: float


RENDERERS = (
    Renderer("daylight-v1", 0.12, (2.5, 1.2), (1.5, 1.5), 0.005),
    Renderer("nocturne-xl", 0.20, (1.2, 2.5), (1.5, 1.5), 0.010),
    Renderer("pastel-mini", 0.28, (1.5, 1.5), (1.2, 2.5), 0.000),
    Renderer("neon-turbo", 0.06, (1.5, 1.5), (2.5, 1.2), 0.015),
)


def facts() -> dict[str, list[dict[str, object]]]:
    """Return tastes and renderers as plain values: what a world depends on beside its configuration."""
    return {"tastes": [asdict(t) for t in TASTES], "renderers": [asdict(r) for r in RENDERERS]}


def draw(wanted: list[scene.Wanted], renderer_index: np.ndarray, rng: np.random.Generator) -> scene.Scenes:
    """Draw one scene per prompt in the style of RENDERERS[renderer_index], with that renderer's errors."""
    style = [RENDERERS[i] for i in renderer_index]
    return scene.sample_scenes(
        wanted,
        rng,
        error_rate=np.array([r.error_rate for r in style]),
        brightness=np.array([rng.beta(*r.brightness) for r in style]),
        saturation=np.array([rng.beta(*r.saturation) for r in style]),
    )


@dataclass(frozen=True)
class Population:
    """Who votes and how.

    temperature: scale of the logistic noise on a difference of utilities; 0.7 makes a majority annotator follow the sign
    of his own utility on 75-85 % of decided pairs. slip_rate: the recorded choice is the opposite of the felt one.
    tie_width: felt differences smaller than this are recorded as ties.
    """

    annotators: int
    minority_share: float
    slip_rate: float
    temperature: float = 0.7
    tie_width: float = 0.12

    def tastes(self, rng: np.random.Generator) -> np.ndarray:
        """Return each annotator's index into TASTES, [annotators]; the share is exact up to rounding."""
        minority = np.arange(self.annotators) < round(self.minority_share * self.annotators)
        return rng.permutation(minority.astype(int))


@dataclass(frozen=True)
class Votes:
    """N votes on (first, second): label_first in {1, 0.5, 0}; is_slip and is_against_mean are False for ties, [N]."""

    label_first: np.ndarray
    is_slip: np.ndarray
    is_against_mean: np.ndarray


def vote(
    own_difference: np.ndarray, mean_difference: np.ndarray, population: Population, rng: np.random.Generator
) -> Votes:
    """Vote on pairs, given U(first) - U(second) under the annotator's own taste and under the population's mean, [N]."""
    felt = own_difference + rng.logistic(0.0, population.temperature, len(own_difference))
    tie = np.abs(felt) < population.tie_width
    slip = (rng.random(len(felt)) < population.slip_rate) & ~tie
    first = (felt > 0) ^ slip
    label = np.where(tie, 0.5, first.astype(float))
    return Votes(label, slip, ~tie & (first != (mean_difference > 0)))


def rank(utilities: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """Rank K pictures by utility + noise (Gumbel, so that a pair's noise is logistic): ranks 1..K, 1 is best."""
    noisy = utilities + rng.gumbel(0.0, temperature, len(utilities))
    ranks = np.empty(len(utilities), dtype=int)
    ranks[np.argsort(-noisy)] = np.arange(1, len(utilities) + 1)
    return ranks
