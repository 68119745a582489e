"""What bfloat16 costs a scorer: the same human pairs scored in float32 and in bfloat16, and how many votes flip.

Belongs here: choosing the pairs, scoring them twice, the row of `scorer_precision`. Does not belong here: how a precision is
computed (`scorer`), what a flip is (`differences`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from pipelines import catalogue, images, schemas, stored
from pipelines.config import Config, ConfigError, ScorerConfig
from pipelines.identity import fingerprint
from pipelines.scoring import checkpoints, devices, differences
from pipelines.tables import Built, Store, StoreError

if TYPE_CHECKING:
    from pipelines.scoring.scorer import Scorer

CODE_VERSION = "1"
PAIRS = 1_000
GOAL = 0.005
"""Share of votes that bfloat16 may flip."""
SHARDS = 8
"""Shards that the pairs are spread over where that many have them: pairs by id alone would read every shard's images."""
_READ = 64
"""Images read at once."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class PrecisionReport:
    """A scorer in bfloat16 against itself in float32; columns of `scorer_precision`."""

    scorer: str
    revision: str
    revision_bfloat16: str
    device: str
    pairs: int
    images_left_out: int
    scores: int
    score_sd: float | None
    difference_mean: float | None
    difference_sd: float | None
    difference_max: float | None
    pairs_decided: int
    flips: int
    ties_made: int
    share_flipped: float | None
    is_goal_met: bool | None
    seconds_float32: float
    seconds_bfloat16: float


def has_model(scorer: ScorerConfig) -> bool:
    """Return whether a scorer computes in a precision that we choose."""
    return scorer.kind not in ("imported", "custom") and scorer.backend == "native"


def configured(config: Config) -> list[ScorerConfig]:
    """Return the scorers that are configured to run in bfloat16."""
    return [s for s in config.scorers if s.precision == "bfloat16" and has_model(s)]


def compare(
    store: Store,
    scorer: ScorerConfig,
    device: str,
    pairs: int = PAIRS,
    progress: Progress = lambda message: None,
) -> PrecisionReport:
    """Score up to `pairs` decided human pairs of the store in both precisions.

    The pairs are the first by id of a few shards, and the same whenever the store is the same. An image that cannot be
    decoded is left out with its pairs.

    Raises:
        ConfigError: the scorer has no model of ours whose precision could be chosen.
        hub.CheckpointError: its checkpoint is missing.
        StoreError: no decided pair of the store has bytes for both images.
    """
    _refuse_without_model(scorer)
    return _compare(store, scorer, device, _choose(store, pairs), progress)


def measure(
    store: Store,
    scorer: ScorerConfig,
    device: str,
    pairs: int = PAIRS,
    progress: Progress = lambda message: None,
) -> Built:
    """Build the scorer's partition of `scorer_precision`, or reuse it: same pairs, weights and kind of device.

    Raises:
        ConfigError, hub.CheckpointError, StoreError: see compare.
    """
    _refuse_without_model(scorer)
    chosen = _choose(store, pairs)
    parameters = {
        "pairs": fingerprint(ids=chosen["pair_id"].to_list()),
        "revisions": [checkpoints.revision(_in(scorer, p)) for p in ("float32", "bfloat16")],
        "device": device.partition(":")[0],
    }

    def make() -> pl.DataFrame:
        report = _compare(store, scorer, device, chosen, progress)
        return pl.DataFrame([vars(report)], schema=schemas.SCORER_PRECISION.polars_schema)

    return store.build(
        schemas.SCORER_PRECISION, make, code_version=CODE_VERSION, parameters=parameters, partition=scorer.name
    )


def _in(scorer: ScorerConfig, precision: str) -> ScorerConfig:
    return scorer.model_copy(update={"precision": precision})


def _refuse_without_model(scorer: ScorerConfig) -> None:
    if not has_model(scorer):
        raise ConfigError(
            f"scorer {scorer.name!r}: kind {scorer.kind!r}, backend {scorer.backend!r} has no model whose precision could be "
            f"chosen; name another scorer"
        )


def _choose(store: Store, pairs: int) -> pl.DataFrame:
    """Return the first decided human pairs by id of a few shards, in an order of shards that mixes sources.

    Columns: pair_id, prompt_id, image_0_id, image_1_id, and the shard whose files hold both images.
    """
    keys = sorted(catalogue.shard_keys(store), key=lambda key: fingerprint(shard=key))
    decided = store.scan(schemas.CATALOGUE_PAIRS).filter(
        pl.col("human_label_0").is_not_null(), pl.col("human_label_0") != 0.5
    )
    chosen = pl.DataFrame(
        schema=dict.fromkeys(("pair_id", "prompt_id", "image_0_id", "image_1_id", "shard"), pl.String)
    )
    for i, key in enumerate(keys):
        if len(chosen) >= pairs:
            break
        part = math.ceil((pairs - len(chosen)) / max(1, min(SHARDS, len(keys)) - i))
        readable = store.scan(schemas.IMAGES, partitions=[key]).filter(pl.col("status") == "ok").select("image_id")
        here = (
            decided.join(catalogue.counted_votes(store, [key]), on="pair_id", how="semi")
            .join(readable, left_on="image_0_id", right_on="image_id", how="semi")
            .join(readable, left_on="image_1_id", right_on="image_id", how="semi")
            .join(chosen.lazy().select("pair_id"), on="pair_id", how="anti")
            .sort("pair_id")
            .head(part)
            .select("pair_id", "prompt_id", "image_0_id", "image_1_id", shard=pl.lit(key))
        )
        chosen = chosen.vstack(here.collect())
    if chosen.is_empty():
        raise StoreError(
            f"{store.location}: no pair with a decided human label has bytes of both images; nothing to compare precisions on"
        )
    return chosen.sort("pair_id")


def _compare(
    store: Store, scorer: ScorerConfig, device: str, chosen: pl.DataFrame, progress: Progress
) -> PrecisionReport:
    from pipelines.scoring import scorer as models

    exact, rough = _in(scorer, "float32"), _in(scorer, "bfloat16")
    progress(f"{scorer.name}: loading it in float32 on {device}")
    model = models.load(exact, device)
    prepared, left_out = _prepare(store, chosen, model)
    at = {image_id: i for i, image_id in enumerate(prepared)}
    known = pl.col("image_0_id").is_in(list(at)) & pl.col("image_1_id").is_in(list(at))
    pairs = chosen.filter(known)
    wanted = (
        pl.concat(pairs.select("prompt_id", image_id=f"image_{i}_id") for i in (0, 1))
        .unique()
        .sort("image_id", "prompt_id")
        .lazy()
        .join(store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt"), on="prompt_id")
        .sort("image_id", "prompt_id")
        .collect()
    )
    inputs = list(prepared.values())
    asked = [(at[i], prompt) for i, prompt in wanted.select("image_id", "prompt").iter_rows()]
    columns, seconds = {}, {}
    for name, config in (("old", exact), ("new", rough)):
        if config is rough:
            # Two large models need not fit beside each other.
            del model
            progress(f"{scorer.name}: loading it in bfloat16")
            model = models.load(rough, device)
        progress(f"{scorer.name}: {len(asked)} scores in {config.precision}")
        if asked:
            # What a device does once, at the first forward, is no property of a precision.
            model.score_pairs(inputs, asked[:1])
        started = time.monotonic()
        columns[f"score_{name}"] = pl.Series(model.score_pairs(inputs, asked), dtype=pl.Float32)
        seconds[name] = time.monotonic() - started
    ok = pl.lit("ok")
    diff = wanted.select("image_id", "prompt_id", status_old=ok, status_new=ok).with_columns(**columns)
    diff = diff.with_columns(difference=pl.col("score_new").cast(pl.Float64) - pl.col("score_old").cast(pl.Float64))
    s = differences.summary(diff, pairs)
    return PrecisionReport(
        scorer=scorer.name,
        revision=checkpoints.revision(exact),
        revision_bfloat16=checkpoints.revision(rough),
        device=device,
        pairs=s.pairs_scored,
        images_left_out=left_out,
        scores=s.scored,
        score_sd=differences.standard_deviation(diff["score_old"].to_numpy()),
        difference_mean=s.mean,
        difference_sd=s.sd,
        difference_max=s.max_abs,
        pairs_decided=s.decided,
        flips=s.flips,
        ties_made=s.ties_made,
        share_flipped=s.share_flipped,
        is_goal_met=None if s.share_flipped is None else s.share_flipped < GOAL,
        seconds_float32=round(seconds["old"], 3),
        seconds_bfloat16=round(seconds["new"], 3),
    )


def _prepare(store: Store, pairs: pl.DataFrame, model: Scorer) -> tuple[dict[str, Any], int]:
    """Return the pictures of the pairs as the model's input, by image_id, and how many could not be read or decoded."""
    from pipelines.scoring.pictures import Picture

    prepared: dict[str, Any] = {}
    for (key,), part in pairs.group_by("shard", maintain_order=True):
        wanted = (set(part["image_0_id"]) | set(part["image_1_id"])) - prepared.keys()
        for rows in stored.read_images(store, str(key), wanted, _READ):
            for row in rows:
                if row.data is None:
                    continue
                # It has a status in `scores`, which says why.
                with contextlib.suppress(images.UndecodableImage):
                    prepared[row.image_id] = model.prepare(Picture(images.decode(row.data), row.data))
    return prepared, len((set(pairs["image_0_id"]) | set(pairs["image_1_id"])) - prepared.keys())


def main_text(
    store: Store,
    config: Config,
    names: Sequence[str] = (),
    device: str = "",
    pairs: int = PAIRS,
    progress: Progress = lambda message: None,
) -> str:
    """Measure these scorers (without names those configured in bfloat16, else all) and return the result as text.

    Raises:
        ConfigError: a name is no scorer of the configuration, or has no model of ours.
        hub.CheckpointError, StoreError: see compare.
    """
    there = {s.name: s for s in config.scorers}
    if unknown := [n for n in names if n not in there]:
        raise ConfigError(f"precision: {unknown[0]!r} is none of the scorers {sorted(there)}")
    chosen = [there[n] for n in names] or configured(config) or [s for s in config.scorers if has_model(s)]
    where = devices.resolve_device(device or config.scoring.device)
    rows = [_row(store, measure(store, s, where, pairs, progress)) for s in chosen]
    return "\n\n".join(text(row) for row in rows)


def _row(store: Store, built: Built) -> dict[str, Any]:
    return store.read(schemas.SCORER_PRECISION, built.manifest.partition).row(0, named=True)


def text(row: dict[str, Any]) -> str:
    """Return a row of `scorer_precision` as text, with the goal and whether it is met."""
    share, met = row["share_flipped"], row["is_goal_met"]
    unread = f", {row['images_left_out']} images could not be read" if row["images_left_out"] else ""
    return "\n".join(
        [
            f"{row['scorer']}: bfloat16 (revision {row['revision_bfloat16']}) against float32 ({row['revision']}) on "
            f"{row['device']}",
            f"  scores           {row['scores']} of {row['pairs']} decided human pairs{unread}",
            f"  difference       mean {_number(row['difference_mean'])}, sd {_number(row['difference_sd'])}, largest "
            f"{_number(row['difference_max'])}; sd of the scores {_number(row['score_sd'])}",
            f"  votes that flip  {row['flips']} of {row['pairs_decided']}, and {row['ties_made']} become ties: "
            + ("unknown" if share is None else f"{100 * share:.2f} %"),
            f"  goal             below {100 * GOAL:g} %: " + ("unknown" if met is None else "yes" if met else "NO"),
            f"  seconds          {row['seconds_float32']:.2f} in float32, {row['seconds_bfloat16']:.2f} in bfloat16",
        ]
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def rows(store: Store, revisions: Mapping[str, str]) -> pl.DataFrame:
    """Return the rows of `scorer_precision` of scorers whose revision (by name) is the one in bfloat16, in this order."""
    there = {m.partition for m in store.manifests(schemas.SCORER_PRECISION.name)}
    found = [schemas.SCORER_PRECISION.empty()]
    for name, revision in revisions.items():
        if name in there:
            found.append(store.read(schemas.SCORER_PRECISION, name).filter(pl.col("revision_bfloat16") == revision))
    return pl.concat(found)
