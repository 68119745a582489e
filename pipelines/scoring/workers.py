"""Scores many shards: in this process, or in one process per GPU (or N on the CPU), each with its own models.

A worker takes the next shard when it has finished one, so that uneven shards cost nothing. Other machines take parts of
the list (`part`): whatever starts commands, a queue of a cluster or a person, starts `python -m pipelines score --part K/N`.
Belongs here: processes. Does not belong here: what a shard's scoring is (`batches`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pipelines import config as configuration
from pipelines.config import Config, ConfigError, ScorerConfig
from pipelines.scoring import batches, devices, imported
from pipelines.scoring.checkpoints import ScoringError
from pipelines.sources import SourceError
from pipelines.tables import Built, Store

Result = tuple[str, dict[str, Built] | Exception]
_SHARD_FAILURES = (SourceError,)
"""What costs one shard alone: a file of its source that cannot be read now."""
_SECONDS_TO_END = 5.0


def part(keys: Sequence[str], which: str) -> list[str]:
    """Return the K-th of N parts of a list of shards, `which` = 'K/N' with K from 1; the same for everybody who asks.

    Raises:
        ConfigError: it is not of that form.
    """
    k, _, n = which.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ConfigError(f"--part {which!r}: expected K/N with 1 <= K <= N, e.g. 3/8")
    return list(keys[int(k) - 1 :: int(n)])


def score_shards(
    store: Store,
    config: Config,
    keys: Sequence[str],
    scorers: Sequence[ScorerConfig],
    *,
    device: str = "auto",
    workers: int = 1,
    progress: batches.Progress = lambda message: None,
) -> Iterator[Result]:
    """Score the shards and yield (key, what was built by scorer, or why the shard failed) as they finish.

    Args:
        device: 'auto', 'cpu', 'cuda' (all GPUs in turn when there are several workers) or one device.
        workers: processes; 1: this one; 0: one per GPU, or one where there is none.

    Raises:
        ScoringError: a worker was killed, or a model failed; finished shards and parts are kept.
        hub.CheckpointError, tables.StoreError: see batches.score_shard.
    """
    device = devices.resolve_device(device)
    places = devices.places(device, workers)
    for scorer in (s for s in scorers if s.kind == "imported"):
        progress(f"{scorer.name}: {imported.coverage_text(imported.coverage(store, scorer))}")
    if len(places) == 1 or len(keys) <= 1:
        if places[0].startswith("cuda"):
            _leave_cores_to_threads()
        models: dict[str, Any] = {}
        for key in keys:
            yield key, _score(store, config, key, scorers, places[0], models, config.scoring.threads, progress)
        return
    context = multiprocessing.get_context("spawn")
    # Each worker takes one place when it starts.
    free = context.Queue()
    for place in places:
        free.put(place)
    messages = context.Queue()
    teller = threading.Thread(target=_tell, args=(messages, progress), daemon=True)
    teller.start()
    threads = config.scoring.threads or max(1, batches.cores() // len(places))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        len(places), context, _start, (store.location, config, tuple(scorers), threads, free, messages)
    )
    try:
        futures = {pool.submit(_work, key): key for key in keys}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException as error:
        # Their parts are kept, and a shard may take an hour: nobody waits for those under way.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ScoringError(
                "a scoring worker died (killed, or out of memory); finished shards and parts are kept, run the command "
                "again, with fewer --workers or a smaller batch_size if memory ran out"
            ) from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        messages.put(None)
        teller.join(_SECONDS_TO_END)


def _leave_cores_to_threads() -> None:
    import torch

    # Each thread that resizes a tensor would start as many threads again as there are cores.
    torch.set_num_threads(1)


def _score(
    store: Store,
    config: Config,
    key: str,
    scorers: Sequence[ScorerConfig],
    device: str,
    models: dict[str, Any],
    threads: int,
    progress: batches.Progress,
) -> dict[str, Built] | Exception:
    try:
        return batches.score_shard(
            store,
            key,
            scorers,
            device=device,
            models=models,
            threads=threads,
            part_seconds=config.scoring.part_seconds,
            progress=progress,
        )
    except _SHARD_FAILURES as error:
        return error


def _tell(messages: Any, progress: batches.Progress) -> None:
    while (message := messages.get()) is not None:
        # Whoever read the messages may have gone; undelivered ones would keep the workers from ending.
        with contextlib.suppress(OSError):
            progress(message)


_worker: dict[str, Any] = {}
"""What a worker process keeps between shards."""


def _start(
    location: str, config: Config, scorers: tuple[ScorerConfig, ...], threads: int, free: Any, messages: Any
) -> None:
    """Prepare a worker process: its place, its share of the cores, and its end when the parent ends."""
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        # A killed parent must leave no GPU held; what is not finished is lost but for its parts.
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    configuration.use_filesystems(config)
    place = free.get()
    if place == "cpu":
        torch.set_num_threads(threads)
    else:
        _leave_cores_to_threads()
    _worker.update(
        store=Store(location), config=config, scorers=scorers, device=place, models={}, threads=threads, tell=messages
    )


def _work(key: str) -> dict[str, Built] | Exception:
    w = _worker
    return _score(w["store"], w["config"], key, w["scorers"], w["device"], w["models"], w["threads"], w["tell"].put)
