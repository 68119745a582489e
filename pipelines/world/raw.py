"""Writes the small world as raw files in the exact layouts of Pick-a-Pic (parquet) and HPDv2 (JSON + image files).

Beside them lies `truth/votes.parquet`, which only evaluation and benchmarks may read: per vote the taste of its
annotator, whether it is against the sign of the population's mean utility, and whether it was a slip.

Belongs here: files. Does not belong here: pictures (`scene`), preferences (`people`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import json
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.world import people, scene

PICKAPIC_SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
CODE_VERSION = "2"
"""Of the grammar, the renderer and the files: another one makes another world from the same parameters."""
FIRST_VOTE_AT = dt.datetime(2023, 2, 1, tzinfo=dt.UTC)


@dataclass(frozen=True)
class WorldConfig:
    """Every number of the small world.

    pickapic_shards: split -> number of shards. rows_per_shard: rows of a Pick-a-Pic shard. session_rows: mean number of
    votes in a session (one person, one prompt, the winner stays). unlabelled_rate: share of validation and test rows
    without label. *_prompts: distinct prompts of a split; no prompt is in two splits. test_raters: per HPDv2 test group.
    """

    seed: int = 7
    minority_share: float = 0.25
    slip_rate: float = 0.05
    temperature: float = 0.7
    pickapic_annotators: int = 60
    hpd_annotators: int = 48
    pickapic_shards: dict[str, int] = field(default_factory=lambda: {"train": 3, "validation": 1, "test": 1})
    pickapic_prompts: dict[str, int] = field(default_factory=lambda: {"train": 320, "validation": 40, "test": 60})
    rows_per_shard: int = 700
    session_rows: int = 4
    unlabelled_rate: float = 0.03
    hpd_train_prompts: int = 100
    hpd_test_groups: int = 60
    hpd_test_groups_of_ten: int = 6
    test_raters: int = 10
    jpeg_quality: int = 95
    prompt_pool: str = "store"
    """Which half of the grammar's prompts: 'store' (two thirds) or 'rewards' (one third, for training reward models)."""

    def __post_init__(self) -> None:
        for name in ("minority_share", "slip_rate", "unlabelled_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"world.{name}: expected a share between 0 and 1, found {getattr(self, name)}")

    def population(self, annotators: int) -> people.Population:
        """Return the population with this world's shares and noise."""
        return people.Population(annotators, self.minority_share, self.slip_rate, self.temperature)


def prompt_pool(name: str) -> list[str]:
    """Return the prompts of a pool: 'rewards' is the third whose hash is 0 modulo 3, 'store' the others."""
    if name not in ("store", "rewards"):
        raise ValueError(f"prompt_pool: expected 'store' or 'rewards', found {name!r}")
    in_rewards = {p: hashlib.sha256(p.encode()).digest()[0] % 3 == 0 for p in scene.all_prompts()}
    return [p for p, reward in in_rewards.items() if reward == (name == "rewards")]


def jpeg_bytes(picture: np.ndarray, quality: int) -> bytes:
    """Encode one uint8 RGB picture as JPEG without chroma subsampling (32 pixels are too few for it)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


class _Pool:
    """Draws pictures one batch at a time and keeps their bytes and utilities."""

    def __init__(self, config: WorldConfig, rng: np.random.Generator) -> None:
        self.config, self.rng = config, rng
        self.tastes = (*people.TASTES, people.mean_taste(config.minority_share))

    def draw(self, prompt: str, count: int) -> tuple[list[bytes], list[str], np.ndarray]:
        """Return `count` pictures for one prompt: JPEG bytes, renderer names, utilities [3, count] (tastes, mean)."""
        wanted = [scene.parse_prompt(prompt)] * count
        style = self.rng.integers(0, len(people.RENDERERS), count)
        scenes = people.draw(wanted, style, self.rng)
        grain = np.array([people.RENDERERS[i].grain for i in style])
        pictures = scene.render(scenes, grain=grain, rng=self.rng)
        utilities = np.stack([t.utility(scenes, wanted) for t in self.tastes])
        data = [jpeg_bytes(p, self.config.jpeg_quality) for p in pictures]
        return data, [people.RENDERERS[i].name for i in style], utilities


def _uid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _pickapic_split(
    config: WorldConfig, split: str, prompts: list[str], tastes: np.ndarray, rng: np.random.Generator
) -> tuple[list[dict], list[dict]]:
    """Return the raw rows of one split in session order, and their truth rows."""
    population, pool = config.population(config.pickapic_annotators), _Pool(config, rng)
    total = config.pickapic_shards[split] * config.rows_per_shard
    rows: list[dict] = []
    truth: list[dict] = []
    clock = FIRST_VOTE_AT
    session = 0
    while len(rows) < total:
        prompt = prompts[session % len(prompts)]
        user = int(rng.integers(config.pickapic_annotators))
        length = min(1 + int(rng.poisson(config.session_rows - 1)), total - len(rows))
        data, models, utilities = pool.draw(prompt, length + 1)
        uids = [_uid(rng) for _ in data]
        left, right = 0, 1
        for k in range(length):
            shown = (left, right) if rng.random() < 0.5 else (right, left)
            first, second = shown
            gaps = utilities[:, first] - utilities[:, second]
            outcome = people.vote(gaps[[tastes[user]]], gaps[[2]], population, rng)
            label = float(outcome.label_first[0])
            clock += dt.timedelta(seconds=int(rng.integers(5, 90)))
            has_label = split == "train" or rng.random() >= config.unlabelled_rate
            best = {1.0: uids[first], 0.5: "tie", 0.0: uids[second]}[label]
            rows.append(
                {
                    "are_different": True,
                    "best_image_uid": best if has_label else "",
                    "caption": prompt,
                    "created_at": clock.replace(tzinfo=None),
                    "has_label": has_label,
                    "image_0_uid": uids[first],
                    "image_0_url": f"https://small-world.invalid/{uids[first]}.jpeg",
                    "image_1_uid": uids[second],
                    "image_1_url": f"https://small-world.invalid/{uids[second]}.jpeg",
                    "jpg_0": data[first],
                    "jpg_1": data[second],
                    "label_0": label if has_label else None,
                    "label_1": 1 - label if has_label else None,
                    "model_0": models[first],
                    "model_1": models[second],
                    "ranking_id": session,
                    "user_id": user,
                }
            )
            truth.append(
                {
                    "taste": people.TASTES[tastes[user]].name,
                    "is_against_mean": bool(outcome.is_against_mean[0]) if has_label else None,
                    "is_slip": bool(outcome.is_slip[0]) if has_label else None,
                }
            )
            if k + 2 <= length:
                left, right = (second if label == 0.0 else first), k + 2
        session += 1
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["caption"]] = counts.get(row["caption"], 0) + 1
    for i, row in enumerate(rows):
        row["num_example_per_prompt"] = counts[row["caption"]]
        row["__index_level_0__"] = i
    return rows, truth


def _write_pickapic(
    config: WorldConfig, folder: Path, prompts: dict[str, list[str]], rng: np.random.Generator
) -> list[dict]:
    (folder / "data").mkdir(parents=True)
    tastes = config.population(config.pickapic_annotators).tastes(rng)
    truth: list[dict] = []
    for split, shards in config.pickapic_shards.items():
        rows, facts = _pickapic_split(config, split, prompts[split], tastes, rng)
        for k in range(shards):
            # Equal cuts fall inside sessions, so that images chain across neighbouring shards as in the original.
            part = slice(k * config.rows_per_shard, (k + 1) * config.rows_per_shard)
            tag = hashlib.sha256(f"{config.seed}/{split}/{k}".encode()).hexdigest()[:16]
            stem = f"{split}-{k:05d}-of-{shards:05d}-{tag}"
            table = pa.Table.from_pylist(rows[part], schema=PICKAPIC_SCHEMA)
            pq.write_table(table, folder / "data" / f"{stem}.parquet", row_group_size=100)
            truth += [
                {"source_row": f"data/{stem}.parquet:{i}", "rater": 0, **fact} for i, fact in enumerate(facts[part])
            ]
    return [{"source": "pickapic", **row} for row in truth]


def _write_images(folder: Path, names: list[str], data: list[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, data, strict=True):
        (folder / name).write_bytes(content)


def _write_hpd(
    config: WorldConfig, folder: Path, prompts: dict[str, list[str]], rng: np.random.Generator
) -> list[dict]:
    """Write train.json (groups of 4 images ranked by one person: 6 pairs) and test.json (9 or 10 images, ten raters)."""
    population, pool = config.population(config.hpd_annotators), _Pool(config, rng)
    tastes = population.tastes(rng)
    names = [hashlib.sha256(f"{config.seed}/hpd/{i}".encode()).hexdigest()[:10] for i in range(config.hpd_annotators)]
    truth: list[dict] = []
    train: list[dict] = []
    for prompt in prompts["hpd_train"]:
        data, _, utilities = pool.draw(prompt, 4)
        files = [f"{len(train):06d}_{i}.jpg" for i in range(4)]
        _write_images(folder / "train", files, data)
        person = int(rng.integers(config.hpd_annotators))
        ranks = people.rank(utilities[tastes[person]], config.temperature, rng)
        for i, j in combinations(range(4), 2):
            slip = bool(rng.random() < config.slip_rate)
            first = bool(ranks[i] < ranks[j]) ^ slip
            train.append(
                {
                    "human_preference": [1, 0] if first else [0, 1],
                    "prompt": prompt,
                    "file_path": [files[i], files[j]],
                }
            )
            against = first != bool(utilities[2, i] > utilities[2, j])
            truth.append(
                {
                    "source": "hpd",
                    "source_row": f"train.json:{len(train) - 1}",
                    "rater": 0,
                    "taste": people.TASTES[tastes[person]].name,
                    "is_against_mean": against,
                    "is_slip": slip,
                }
            )
    test: list[dict] = []
    for g, prompt in enumerate(prompts["hpd_test"]):
        count = 10 if g < config.hpd_test_groups_of_ten else 9
        data, _, utilities = pool.draw(prompt, count)
        files = [f"{g:05d}_{i}.jpg" for i in range(count)]
        _write_images(folder / "test", files, data)
        raters = rng.choice(config.hpd_annotators, config.test_raters, replace=False)
        raw = []
        for r, person in enumerate(raters):
            ranks = people.rank(utilities[tastes[person]], config.temperature, rng)
            raw.append({"rank": ranks.tolist(), "user_hash": names[person]})
            pairs = list(combinations(range(count), 2))
            for k, (i, j) in enumerate(pairs):
                against = bool(ranks[i] < ranks[j]) != bool(utilities[2, i] > utilities[2, j])
                truth.append(
                    {
                        "source": "hpd",
                        "source_row": f"test.json:{g}",
                        "rater": r * len(pairs) + k,
                        "taste": people.TASTES[tastes[person]].name,
                        "is_against_mean": against,
                        "is_slip": None,
                    }
                )
        mean = np.mean([x["rank"] for x in raw], axis=0)
        rank = (np.argsort(np.argsort(mean, kind="stable"), kind="stable") + 1).tolist()
        test.append({"prompt": prompt, "image_path": files, "rank": rank, "raw_annotations": raw})
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps(test))
    return truth


def write_world(folder: Path, config: WorldConfig | None = None) -> bool:
    """Write the world below `folder` (pickapic/, hpdv2/, truth/); return False if it already lies there unchanged.

    The world is written beside and renamed at the end; `world.json` holds the parameters that made it.

    Raises:
        ValueError: more prompts are asked for than the pool has.
        FileExistsError: `folder` holds something that is not a small world.
    """
    config = config or WorldConfig()
    facts = {"code_version": CODE_VERSION, "people": people.facts(), **asdict(config)}
    parameters = json.dumps(facts, indent=2, sort_keys=True)
    mark = folder / "world.json"
    if mark.exists() and mark.read_text() == parameters:
        return False
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: holds files but no world.json; name an empty folder for the small world")
    rng = np.random.default_rng(config.seed)
    pool = prompt_pool(config.prompt_pool)
    wanted = {**config.pickapic_prompts, "hpd_train": config.hpd_train_prompts, "hpd_test": config.hpd_test_groups}
    if sum(wanted.values()) > len(pool):
        raise ValueError(
            f"prompts: the pool {config.prompt_pool!r} has {len(pool)}, found {sum(wanted.values())} wanted"
        )
    order = iter(rng.permutation(len(pool)))
    prompts = {name: [pool[next(order)] for _ in range(count)] for name, count in wanted.items()}

    staging = folder.with_name(folder.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    truth = _write_pickapic(config, staging / "pickapic", prompts, rng)
    truth += _write_hpd(config, staging / "hpdv2", prompts, rng)
    (staging / "truth").mkdir()
    pl.DataFrame(truth, infer_schema_length=None).write_parquet(staging / "truth" / "votes.parquet")
    (staging / mark.name).write_text(parameters)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return True
