"""`python -m pipelines`: the data steps without Dagster.

python -m pipelines run                   world, ingest, catalogue, scores and labels, in order
python -m pipelines world|ingest|score|label
python -m pipelines score [--scorers a,b] [--workers N] [--part K/N] [--shards-file FILE] [--no-activate] [--dry-run]
python -m pipelines score-diff SCORER OLD NEW    what changed between two revisions
python -m pipelines status                per table: done, out of date, failed, and what to do
python -m pipelines check [TABLE ...]     read the tables again and check them; what is wrong, and exit status 1
python -m pipelines prune [--dry-run]     remove old revisions of scores and old launches
python -m pipelines scorers               the scorer report: accuracy, correlation, what bfloat16 costs
python -m pipelines precision [SCORER ...]  what bfloat16 would cost these scorers, on human pairs of the store
python -m pipelines card                  the label card: who voted, agreement, minority, what each policy drops
python -m pipelines pairs [QUERY] [--where SQL] [--order-by SQL] [--policy P] [--limit N] [--blur P] [--out FILE]
                                          pages that show pairs; one page with a query or a condition, else all
python -m pipelines export FOLDER --policy P [--splits train,test]   Pick-a-Pic's own layout, for any DPO script
python -m pipelines show TABLE            print rows of a table (--rows N)
python -m pipelines sql "SELECT ..."      query the tables with DuckDB, by their names
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl

from pipelines import (
    accounting,
    catalogue,
    checks,
    curation,
    ingest,
    label_card,
    pairs_page,
    reporting,
    retention,
    schemas,
    status,
    steps,
)
from pipelines import config as configuration
from pipelines import export as exports
from pipelines.errors import run_command
from pipelines.sources import SourceError
from pipelines.tables import Built, Store, StoreError
from pipelines.world import raw

ORDER = ("world", "ingest", "score", "label")
NAMED = ("score-diff", "check", "precision", "pairs", "export", "show", "sql")
"""What takes names behind it."""


def say(message: str) -> None:
    """Print one line at once."""
    print(message, flush=True)


def _tell(name: str, built: Built) -> None:
    m = built.manifest
    statuses = ", ".join(f"{v} {k}" for k, v in m.rows_by_status.items() if k != "ok")
    say(
        f"{name}: {m.rows} rows"
        + (f" ({statuses})" if statuses else "")
        + (", unchanged" if built.is_reused else f", {m.seconds:.1f} s")
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("run", *ORDER, *_ALONE))
    parser.add_argument(
        "names",
        nargs="*",
        help="show: a table; check: tables; sql: a query; score-diff: SCORER OLD NEW; precision: scorers; pairs: a query; "
        "export: a folder",
    )
    parser.add_argument("--rows", type=int, default=10, help="rows to show")
    parser.add_argument("--config", help="TOML file; default: $POLYPHONY_CONFIG, else the small world")
    parser.add_argument("--device", help="device of the reward models; default: scoring.device")
    parser.add_argument("--scorers", help="score only these, by name, joined by commas; default: all")
    parser.add_argument("--workers", type=int, help="processes that score; 0: one per GPU; default: scoring.workers")
    parser.add_argument("--part", help="K/N: score the K-th of N parts of the shards, for launchers")
    parser.add_argument("--shards-file", help="score: a file with the keys of the shards to score, one per line")
    parser.add_argument(
        "--no-activate", action="store_true", help="score: leave the active revisions and the views as they are"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="score nothing; say what is left and how long it would take"
    )
    parser.add_argument(
        "--policy", help="pairs, export: a pair policy, 'name' or 'name:option=value'; " + ", ".join(curation.POLICIES)
    )
    parser.add_argument("--splits", default=",".join(schemas.SPLITS), help="export: splits, joined by commas")
    parser.add_argument("--where", help="pairs: SQL condition on columns of preferences")
    parser.add_argument("--order-by", help="pairs: SQL expression, '... DESC' for largest first")
    parser.add_argument("--limit", type=int, default=200, help="pairs: pairs shown on a page at most")
    parser.add_argument("--blur", type=float, default=0.0, help="pairs: blur pictures, percent of their longer side")
    parser.add_argument("--out", help="pairs: file of the page; default: pairs/<query>.html in the store")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.names and options.what not in NAMED:
        parser.error(f"{options.what} takes no names, found {options.names}")
    for option, owners in _OPTIONS_OF.items():
        if getattr(options, option) and options.what not in owners:
            parser.error(f"--{option.replace('_', '-')} belongs to {' and '.join(owners)}, found {options.what}")
    config = configuration.load(options.config)
    store = Store(config.store_location)
    if options.what in _ALONE:
        return _ALONE[options.what](store, config, options)
    wanted = ORDER if options.what == "run" else (options.what,)
    if "world" in wanted and config.world is not None:
        written = raw.write_world(config.world_folder, config.world)
        say(f"small world in {config.world_folder}: " + ("written" if written else "unchanged"))
    store.clear_staging()
    failed = _ingest(store, config) if "ingest" in wanted else []
    # Later steps need the tables alone, not the raw files.
    keys = catalogue.shard_keys(store) if {"score", "label"} & set(wanted) else []
    if "score" in wanted:
        failed += _score(store, config, keys, options)
        if options.dry_run:
            return 0
    if "label" in wanted:
        labels = steps.Labels(store, config, keys)
        for name in steps.LABEL_TABLES:
            _tell(name, getattr(labels, name)())
        for name, built in labels.drift().items():
            _tell(name, built)
        say(f"label card: {label_card.build(store)}")
    if not options.no_activate:
        say(f"tables: {store.location}; DuckDB views: {store.write_views()}")
    if failed:
        done = "scored" if options.what == "score" else "ingested"
        raise SourceError(f"{len(failed)} shards failed, the others are {done}: " + "; ".join(failed))
    return 0


def _ingest(store: Store, config: configuration.Config) -> list[str]:
    """Ingest every shard, catalogue those that are ingested, account for them; return why the others failed."""
    shards = ingest.list_shards(config)
    plans = ingest.plans(config, shards)
    failed: list[str] = []
    for i, shard in enumerate(shards, 1):
        try:
            built = ingest.ingest_shard(store, plans[shard.source], shard, say)["votes"]
            _tell(f"{i}/{len(shards)} votes {shard.key}", built)
        except SourceError as error:
            # One bad file costs one shard.
            failed.append(str(error))
            say(f"{i}/{len(shards)} votes {shard.key}: failed: {error}")
    keys, absent = ingest.ingested(store, shards)
    if absent:
        say(f"not in the catalogue, because not ingested: {', '.join(absent)}")
    for name, built in catalogue.build(store, keys, config.splits).items():
        _tell(name, built)
    layouts = {name: how.source.layout for name, how in plans.items()}
    _tell("accounting", accounting.build(store, [s for s in shards if s.key in set(keys)], layouts))
    return failed


def _score(store: Store, config: configuration.Config, keys: list[str], options: argparse.Namespace) -> list[str]:
    """Score the shards, or say what that would take; activate what is complete; return why shards failed."""
    from pipelines.scoring import batches, devices, forecast, workers

    chosen = _chosen(config, options.scorers)
    device = devices.resolve_device(options.device or config.scoring.device)
    count = config.scoring.workers if options.workers is None else options.workers
    mine = _listed(options.shards_file, keys) if options.shards_file else keys
    mine = workers.part(mine, options.part) if options.part else mine
    if options.dry_run:
        places = devices.places(device, count)
        threads = config.scoring.threads or max(1, batches.cores() // len(places))
        ahead = forecast.forecast(store, mine, chosen, device=places[0], threads=threads, progress=say)
        say(ahead.text(len(places)))
        return []
    failed: list[str] = []
    results = workers.score_shards(store, config, mine, chosen, device=device, workers=count, progress=say)
    with reporting.opened() as report:
        for i, (key, result) in enumerate(results, 1):
            if isinstance(result, Exception):
                # One unreadable file costs one shard.
                failed.append(str(result))
                say(f"{i}/{len(mine)} scores {key}: failed: {result}")
                report({"shard": key, "error": str(result)})
                continue
            for name, built in result.items():
                _tell(f"{i}/{len(mine)} scores {name} {key}", built)
            report({"shard": key, "scorers": {name: _told(built) for name, built in result.items()}})
    if options.no_activate:
        return failed
    active, pending = batches.activate_finished(store, config, keys, chosen)
    say(f"active revisions: {', '.join(f'{name} {revision}' for name, revision in active.items()) or 'none'}")
    if pending and not (failed or options.part or options.shards_file or options.scorers):
        raise StoreError("; ".join(pending))
    for why in pending:
        say(f"not complete yet: {why}")
    return failed


def _told(built: Built) -> dict[str, int | bool]:
    """Return what a launcher is told of a scorer's scores of a shard."""
    images = built.manifest.extra.get("images_prepared", 0)
    return {"rows": built.manifest.rows, "images": images, "is_unchanged": built.is_reused}


def _listed(file: str, keys: list[str]) -> list[str]:
    """Return the shards that a file names, in its order.

    Raises:
        StoreError: one of them is not in the catalogue.
    """
    listed = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    if unknown := sorted(set(listed) - set(keys)):
        raise StoreError(f"{file}: {unknown} are no shards of the catalogue; ingest and catalogue them first")
    return listed


def _chosen(config: configuration.Config, names: str | None) -> list[configuration.ScorerConfig]:
    if names is None:
        return list(config.scorers)
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    known = {s.name: s for s in config.scorers}
    if unknown := [n for n in wanted if n not in known] or (["nothing"] if not wanted else []):
        raise configuration.ConfigError(f"--scorers: found {unknown}; the configuration has {sorted(known)}")
    return [known[n] for n in wanted]


def _policy(text: str | None) -> curation.Policy | None:
    return None if text is None else curation.parse(text)


def _pairs(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    keys, policy = catalogue.shard_keys(store), _policy(options.policy)
    if len(options.names) > 1:
        raise StoreError(f"pairs: expected one query of {sorted(pairs_page.QUERIES)}, found {options.names}")
    if not (options.names or options.where or options.order_by or options.out):
        for name, path in pairs_page.write_all(store, keys, options.limit, policy=policy, blur=options.blur).items():
            say(f"{name}: {path}")
        return 0
    query = options.names[0] if options.names else "random"
    page = pairs_page.page(
        store,
        keys,
        query=query,
        where=options.where,
        order_by=options.order_by,
        policy=policy,
        limit=options.limit,
        blur=options.blur,
    )
    if options.out:
        file = Path(options.out)
        staged = file.with_name(f".{file.name}.staged")
        staged.write_text(page, encoding="utf-8")
        staged.replace(file)
        say(f"page: {file}")
        return 0
    name = f"pairs/{query}.html" if options.where is None and options.order_by is None else "pairs/query.html"
    store.publish(name, page.encode())
    say(f"page: {store.path(name)}")
    return 0


def _export(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    if len(options.names) != 1 or options.policy is None:
        raise StoreError(
            f"export: expected FOLDER and --policy (of {sorted(curation.POLICIES)}), found {options.names} and "
            f"{options.policy!r}"
        )
    policy = curation.parse(options.policy)
    splits = [s.strip() for s in options.splits.split(",") if s.strip()]
    done = exports.export(
        store,
        policy,
        Path(options.names[0]),
        shard_keys=catalogue.shard_keys(store),
        splits=splits,
        card=label_card.card(store, [policy]),
        progress=say,
    )
    say(done.text())
    return 0


def _score_diff(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    from pipelines.scoring import differences

    names = options.names
    if len(names) != 3:
        raise StoreError(
            f"score-diff: expected SCORER OLD NEW, found {names}; revisions are folders of scores/<scorer>"
        )
    say(differences.main_text(store, *names))
    return 0


def _scorers(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    from pipelines.scoring import devices, precision, report

    for scorer in precision.configured(config):
        place = devices.resolve_device(options.device or config.scoring.device)
        _tell(f"scorer_precision {scorer.name}", precision.measure(store, scorer, place, progress=say))
    for name, built in report.build(store, config, catalogue.shard_keys(store)).items():
        _tell(name, built)
    store.write_views()
    store.publish("scorers.png", report.picture(store))
    say(report.table_text(store))
    say(f"picture: {store.path('scorers.png')}")
    return 0


def _sql(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    import duckdb

    query = " ".join(options.names)
    if not query:
        raise StoreError('sql: expected a query, found none; e.g. "SELECT count(*) FROM votes"')
    store.write_views()
    with duckdb.connect() as connection:
        if not store.is_local:
            connection.register_filesystem(store.filesystem)
        connection.execute(store.read_text("views.sql"))
        # All columns, unless a terminal has no room for them.
        connection.sql(query).show(max_width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000)
    return 0


def _show(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    table, rows = (options.names or [None])[0], options.rows
    if table not in schemas.TABLES:
        raise StoreError(f"show: expected a table of {sorted(schemas.TABLES)}, found {table!r}")
    with pl.Config(tbl_rows=rows, tbl_cols=-1, fmt_str_lengths=40):
        frame = store.scan(schemas.TABLES[table]).head(rows).collect()
        say(str(frame.drop([c for c, t in frame.schema.items() if t == pl.Binary])))
    return 0


def _precision(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    from pipelines.scoring import precision

    say(precision.main_text(store, config, options.names, options.device or "", progress=say))
    return 0


def _card(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    path = label_card.build(store)
    say(store.read_text(label_card.FILE))
    say(f"card: {path}")
    return 0


def _status(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    say(status.main_text(store, config))
    return 0


def _prune(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    say(retention.main_text(store, config, dry_run=options.dry_run))
    return 0


def _check(store: Store, config: configuration.Config, options: argparse.Namespace) -> int:
    """Print what the checks of these tables (of all that are there) find; return 1 if one that is no warning failed."""
    if unknown := [n for n in options.names if n not in schemas.TABLES]:
        raise StoreError(f"check: expected tables of {sorted(schemas.TABLES)}, found {unknown}")
    failed = 0
    for name in options.names or [t for t in schemas.TABLES if store.manifests(t)]:
        for found in checks.of_table(store, config, name):
            failed += found.blocking and not found.passed
            mark = "ok" if found.passed else "FAILED" if found.blocking else "warning"
            say(f"{name:<22} {found.name:<22} {mark:<8} {found.description}")
    return min(failed, 1)


_ALONE: dict[str, Callable[[Store, configuration.Config, argparse.Namespace], int]] = {
    "card": _card,
    "check": _check,
    "export": _export,
    "pairs": _pairs,
    "precision": _precision,
    "prune": _prune,
    "score-diff": _score_diff,
    "scorers": _scorers,
    "show": _show,
    "sql": _sql,
    "status": _status,
}
"""What looks at the tables, or does something beside the main job."""
_OPTIONS_OF = {"dry_run": ("score", "prune"), "shards_file": ("score",), "no_activate": ("score",)}


if __name__ == "__main__":
    sys.exit(run_command(main))
