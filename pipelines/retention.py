"""Removes what nobody needs any more: old revisions of scores, old launches.

A revision goes in the order commits, files, parts, records of failures: readers trust commits, so that none of them ever
meets a file that is half removed, and whatever an interrupted removal leaves goes with the next one.
Belongs here: which of these may go, and removing them. Does not belong here: Dagster's runs, tables that are current.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines import schemas
from pipelines.config import Config
from pipelines.hub import CheckpointError
from pipelines.scoring import checkpoints
from pipelines.scoring.imported import ImportedScoresError
from pipelines.tables import Manifest, Store

DAY = 86_400.0
_SCORES = schemas.SCORES.name
_PLACES = (f"_manifests/{_SCORES}", _SCORES, f"_parts/{_SCORES}", f"_failures/{_SCORES}")
"""Where a revision has files, in the order of removal."""


@dataclass(frozen=True)
class Removed:
    """Something that was removed, or in a dry run would be: rows (of tables) and bytes that this frees."""

    what: str
    rows: int
    bytes: int
    is_dry: bool

    @property
    def text(self) -> str:
        """Return the sentence for a log."""
        rows = f"{self.rows} rows, " if self.rows else ""
        return f"{self.what}: {'would be removed' if self.is_dry else 'removed'} ({rows}{self.bytes / 1e6:.1f} MB)"


def prune(store: Store, config: Config, *, dry_run: bool = False) -> list[Removed]:
    """Remove old revisions of scores and old launches by the numbers of the configuration; return what went."""
    automation = config.automation
    scores = prune_scores(store, config, automation.keep_revisions, dry_run=dry_run)
    return [*scores, *prune_launches(config.home, automation.keep_run_days, dry_run=dry_run)]


def main_text(store: Store, config: Config, *, dry_run: bool = False) -> str:
    """Prune by the numbers of the configuration; return for a terminal what went."""
    found = prune(store, config, dry_run=dry_run)
    return "\n".join(r.text for r in found) if found else "nothing to remove"


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass
class _Revision:
    """What lies there of a revision: its commits, bytes of all its files, and the last time that anything was written."""

    commits: list[Manifest]
    bytes: int = 0
    written_at: float = 0.0


def prune_scores(store: Store, config: Config, keep_revisions: int, *, dry_run: bool = False) -> list[Removed]:
    """Remove all but `keep_revisions` revisions of every scorer's scores; return what went.

    The active revision stays, the configuration's present one (it may be being scored), and whatever was written to within
    the last day; of the others the newest, as far as `keep_revisions` reaches. Revisions of a scorer that the configuration
    does not name count alike. Of a scorer whose files are missing nothing is removed: its present revision is not known.
    """
    removed = []
    for scorer, revisions in sorted(_revisions(store).items()):
        kept = _always_kept(store, config, scorer)
        if kept is None:
            continue
        others = sorted((r for r in revisions if r not in kept), key=lambda r: revisions[r].written_at, reverse=True)
        # Remains of an interrupted removal are nobody's choice to keep.
        whole = [r for r in others if revisions[r].commits]
        room = max(0, keep_revisions - len(kept & revisions.keys()))
        for revision in others:
            found = revisions[revision]
            if revision in whole[:room] or time.time() - found.written_at < DAY:
                continue
            # Asked again: it may have been made active meanwhile.
            if store.current_revisions().get(scorer) == revision:
                continue
            below = f"{scorer}/revision={revision}"
            if not dry_run:
                for place in _PLACES:
                    store.remove(f"{place}/{below}")
            rows = sum(m.rows for m in found.commits)
            removed.append(Removed(f"{_SCORES}/{below}", rows, found.bytes, dry_run))
    return removed


def _always_kept(store: Store, config: Config, scorer: str) -> set[str] | None:
    """Return the active and the present revision of a scorer; None where the present one cannot be known."""
    kept = {revision for name, revision in store.current_revisions().items() if name == scorer}
    for configured in config.scorers:
        if configured.name == scorer:
            try:
                kept.add(checkpoints.revision(configured))
            except (CheckpointError, ImportedScoresError):
                return None
    return kept


def _revisions(store: Store) -> dict[str, dict[str, _Revision]]:
    """Return scorer -> revision -> what lies there of it."""
    found: dict[str, dict[str, _Revision]] = {}
    commits = {m.partition: m for m in store.manifests(_SCORES)}
    for manifest in commits.values():
        of = _at(found, manifest.partition)
        if of is not None:
            of.commits.append(manifest)
            of.written_at = max(of.written_at, manifest.written_at)
    for place in _PLACES:
        for partition, size, changed in _files(store, place):
            of = _at(found, partition)
            if of is None:
                continue
            of.bytes += size
            # Of what is committed the commit says when; a copied store has files of today.
            if partition.rpartition(".")[0] not in commits:
                of.written_at = max(of.written_at, changed)
    return found


def _at(found: dict[str, dict[str, _Revision]], partition: str) -> _Revision | None:
    """Return the revision that a partition '<scorer>/revision=<12 hex>/<shard>' is of; None: it is no partition of scores."""
    scorer, _, rest = partition.partition("/")
    revision, _, shard = rest.partition("/")
    if not (shard and revision.startswith("revision=")):
        return None
    return found.setdefault(scorer, {}).setdefault(revision.removeprefix("revision="), _Revision([]))


def _files(store: Store, folder: str) -> list[tuple[str, int, float]]:
    """Return the files below a folder of the store: path below it, bytes, time of change."""
    fs, where = store.filesystem, store.path(folder)
    fs.invalidate_cache()
    root = fs._strip_protocol(where)
    try:
        listed = fs.find(root, detail=True)
    except FileNotFoundError:
        return []
    return [(name[len(root) + 1 :], int(info.get("size") or 0), _changed(info)) for name, info in listed.items()]


def _changed(info: dict[str, Any]) -> float:
    """Return when a file was written, seconds since 1970; where its filesystem does not say, it counts as written now."""
    told = next(
        (info[k] for k in ("mtime", "LastModified", "last_modified", "updated", "created") if info.get(k)), None
    )
    if isinstance(told, str):
        told = datetime.fromisoformat(told)
    if isinstance(told, datetime):
        return told.timestamp()
    return float(told) if isinstance(told, int | float) else time.time()


# --- launches --------------------------------------------------------------------------------------------------------


def prune_launches(home: str | Path, older_than_days: float, *, dry_run: bool = False) -> list[Removed]:
    """Remove the folders of `<home>/launches` in which nothing was written for so many days; return what went.

    They hold what the processes of a run were given, and nothing that a table or a model is made from.
    """
    root = Path(home) / "launches"
    removed = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        # A link leads to something that is not ours.
        if not folder.is_dir() or folder.is_symlink():
            continue
        found = [f.lstat() for f in (folder, *folder.rglob("*"))]
        if time.time() - max(s.st_mtime for s in found) < older_than_days * DAY:
            continue
        if not dry_run:
            shutil.rmtree(folder)
        removed.append(Removed(f"launches/{folder.name}", 0, sum(s.st_size for s in found[1:]), dry_run))
    return removed
