"""Trajectories: latents inverted by a reference model that does not move, computed once and kept as a table.

A trajectory is of one image (mirrored or not) under one prompt (or the empty one): latents at levels of a grid, from the
posterior's mean. It is a function of image, prompt and model, not of a draw; InPO's noise is keyed by what it is added to.
So any run reads what another has made, and only the levels that are drawn need to lie there.
Belongs here: which are missing, making and reading them. Does not belong here: the mathematics (`inversion`), which levels a
run draws (`data`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import polars as pl
import torch

from pipelines import schemas
from pipelines.tables import Manifest, Store, StoreError, made_of
from trainers import caches, randomness, versions
from trainers.backbones.conditioning import Conditioning
from trainers.inversion import MODES, Noise, levels, walk
from trainers.recipes import Inversion
from trainers.tensors import TensorFile, pack

CODE_VERSION = versions.TRAJECTORIES
PART = 256
"""Trajectories per partition: what a killed run loses at most."""
Progress = Callable[[str], None]
Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""predict(x [N, C, H, W], labels [N], conditioning of N prompts) -> e or v, [N, C, H, W]."""

_KEY = list(schemas.TRAJECTORIES.key)
_WHOSE = ["image_id", "prompt_id", "is_flipped"]
VERSIONS = {"code": CODE_VERSION, "latents": caches.CODE_VERSION, "schema": schemas.TRAJECTORIES.version}
"""Of what makes trajectories, with the cached latents that they start from."""


def missing(store: Store, where: str, wanted: pl.DataFrame) -> pl.DataFrame:
    """Return the distinct rows of `wanted` (image_id, prompt_id, is_flipped, level) that do not lie below `where`.

    Raises:
        StoreError: what lies there was made by another version of the program.
    """
    below = f"{where.rstrip('/')}/"
    parts = store.manifests(schemas.TRAJECTORIES.name, below)
    if old := [m for m in parts if m.extra.get("versions") != VERSIONS]:
        raise StoreError(
            f"{store.location}: table trajectories, partition {old[0].partition}: made by versions "
            f"{old[0].extra.get('versions')}, these are {VERSIONS}; remove {store.path('trajectories', below)} to make them "
            "anew"
        )
    rows = wanted.select(*_WHOSE, pl.col("level").cast(pl.Int32)).unique(maintain_order=True)
    there = store.scan(schemas.TRAJECTORIES, partitions=[m.partition for m in parts]).select(_KEY).collect()
    return rows.join(there, on=_KEY, how="anti", maintain_order="left")


def size_bytes(rows: int, shape: Sequence[int]) -> int:
    """Return what so many latents [C, H, W] take on a disk, in bytes."""
    return 2 * rows * math.prod(shape)


def inpo_noise(whose: Sequence[tuple[str, str, bool]], shape: tuple[int, ...]) -> Noise:
    """Return InPO's noise [M, C, H, W] for rows of these (image_id, prompt_id, is_flipped), the same in every run."""

    def noise(rows: torch.Tensor, level: int) -> torch.Tensor:
        named = [whose[row] for row in rows.tolist()]
        return randomness.normal(shape, [("inpo", image, prompt, int(flip), level) for image, prompt, flip in named])

    return noise


def ensure(
    store: Store,
    wanted: pl.DataFrame,
    *,
    where: str,
    inversion: Inversion,
    x0: Callable[[list[tuple[str, bool]]], torch.Tensor],
    conditioning: Callable[[list[str]], Conditioning],
    predict: Predict,
    alphas_cumprod: torch.Tensor,
    predicts_velocity: bool,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    progress: Progress = lambda message: None,
    part_size: int = PART,
) -> list[Manifest]:
    """Make the latents that are wanted and do not lie below `where`; return the commits of what this call has made.

    All levels of a trajectory are computed in one pass from its start, never from a stored latent, so that a latent does not
    depend on what was wanted before. Longer trajectories come first; parts of `part_size` are committed one by one. A rank
    makes a share that is a function of `wanted` alone: shares do not overlap, whatever the others have finished.

    Args:
        wanted: image_id, prompt_id, is_flipped, level. A level that training draws as a timestep between the grid's levels
            (released, inpo) is `inversion.level_of` of it.
        where: partitions' path, of the model that inverts and the mode: '<backbone>-<digest>/<mode>-<steps>'.
        x0: returns the scaled means of the posteriors of (image_id, is_flipped), [N, C, H, W].
        conditioning: returns the embeddings of prompt ids.
        predict: the reference model, on alphas_cumprod's device.
        batch_size: trajectories per forward.

    Raises:
        ValueError: a level is none of the grid's.
        StoreError: see missing.
    """
    where, grid = where.rstrip("/"), levels(len(alphas_cumprod), inversion.steps, inversion.mode).tolist()
    if odd := sorted(set(wanted["level"]) - set(grid)):
        raise ValueError(
            f"trajectories {where}: column level: expected the grid's {grid}, found {odd[:5]}; inversion.level_of gives "
            "the level of a timestep"
        )
    device = alphas_cumprod.device

    def made(batch: pl.DataFrame) -> Iterator[tuple[str, str, bool, int, bytes, int, int]]:
        whose, asked = batch.select(_WHOSE).rows(), batch["level"].to_list()
        start = x0([(image, flip) for image, _, flip in whose]).to(device)
        told = conditioning([prompt for _, prompt, _ in whose]).to(device)
        for level, rows, reached in walk(
            start,
            [max(a) for a in asked],
            alphas_cumprod,
            inversion.steps,
            lambda x, labels, rows: predict(x, labels, told[rows]),
            mode=MODES[inversion.mode],
            predicts_velocity=predicts_velocity,
            noise=inpo_noise(whose, tuple(start.shape[1:])),
        ):
            for row, latent in zip(rows.tolist(), reached.cpu(), strict=True):
                if level in asked[row]:
                    yield (*whose[row], level, pack(latent), latent.shape[1], latent.shape[2])

    share = _longest_first(wanted).select(_WHOSE).gather_every(world, rank)
    todo = _longest_first(missing(store, where, wanted).join(share, on=_WHOSE, how="semi"))
    started, done, commits = time.monotonic(), 0, []

    def frames(part: pl.DataFrame) -> Iterable[pl.DataFrame]:
        nonlocal done
        for batch in part.iter_slices(batch_size):
            yield pl.DataFrame(list(made(batch)), schema=schemas.TRAJECTORIES.polars_schema, orient="row")
            done += len(batch)
            rate = done / max(1e-9, time.monotonic() - started)
            progress(f"trajectories {where}: {done}/{len(todo)}, {rate:.1f} per second")

    for part in todo.iter_slices(part_size):
        made_from = made_of(schemas.TRAJECTORIES, {}, CODE_VERSION, {"where": where, "rows": part.rows()})
        commits.append(
            store.write(
                schemas.TRAJECTORIES,
                frames(part),
                partition=f"{where}/part-{made_from}",
                made_from=made_from,
                extra={
                    "versions": VERSIONS,
                    "mode": inversion.mode,
                    "steps": inversion.steps,
                    "trajectories": len(part),
                },
            )
        )
    return commits


def _longest_first(rows: pl.DataFrame) -> pl.DataFrame:
    """Return one row per trajectory with the list of its levels, in an order that depends on the rows alone."""
    grouped = rows.group_by(_WHOSE).agg(pl.col("level").unique().sort())
    order = [pl.col("level").list.last(), *_WHOSE]
    return grouped.sort(order, descending=[True, False, False, False])


def read(
    file: TensorFile,
    image_ids: Sequence[str],
    prompt_ids: Sequence[str],
    is_flipped: Sequence[bool],
    levels: Sequence[int],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Return latents of a TensorFile of trajectories, float32 [N, C, H, W].

    Raises:
        StoreError: one is not there.
    """
    keys = list(zip(image_ids, prompt_ids, is_flipped, levels, strict=True))
    if lost := file.missing(keys):
        raise StoreError(
            f"{file.name} lacks {len(lost)} latents, the first {lost[0]} of {_KEY}; start the run again: it makes what is "
            "missing"
        )
    return file.read("latent", keys, shape)
