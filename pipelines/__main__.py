"""`python -m pipelines`: the data steps without Dagster.

python -m pipelines run                   world, ingest, catalogue, scores and labels, in order
python -m pipelines world|ingest|score|label
python -m pipelines show TABLE            print rows of a table (--rows N)
python -m pipelines sql "SELECT ..."      query the tables with DuckDB, by their names
"""

from __future__ import annotations

import argparse
import shutil
import sys

import polars as pl

from pipelines import accounting, catalogue, ingest, schemas, steps
from pipelines import config as configuration
from pipelines.errors import run_command
from pipelines.sources import SourceError
from pipelines.tables import Built, Store, StoreError
from pipelines.world import raw

ORDER = ("world", "ingest", "score", "label")


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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("run", *ORDER, "show", "sql"))
    parser.add_argument("table", nargs="?", help="table to show, or SQL")
    parser.add_argument("--rows", type=int, default=10, help="rows to show")
    parser.add_argument("--config", help="TOML file; default: $POLYPHONY_CONFIG, else the small world")
    parser.add_argument("--device", help="device of the reward models; default: scoring.device")
    options = parser.parse_args(arguments)
    config = configuration.load(options.config)
    store = Store(config.store_location)
    if options.what == "show":
        return _show(store, options.table, options.rows)
    if options.what == "sql":
        return _sql(store, options.table)
    wanted = ORDER if options.what == "run" else (options.what,)
    if "world" in wanted and config.world is not None:
        written = raw.write_world(config.world_folder, config.world)
        say(f"small world in {config.world_folder}: " + ("written" if written else "unchanged"))
    store.clear_staging()
    failed = _ingest(store, config) if "ingest" in wanted else []
    # Later steps need the tables alone, not the raw files.
    keys = catalogue.shard_keys(store) if {"score", "label"} & set(wanted) else []
    if "score" in wanted:
        from pipelines.scoring import batches, devices

        device = devices.resolve_device(options.device or config.scoring.device)
        models: dict = {}
        for key in keys:
            for name, built in batches.score_shard(
                store, key, list(config.scorers), device=device, models=models
            ).items():
                _tell(f"scores {name} {key}", built)
        batches.activate(store, config, keys)
    if "label" in wanted:
        labels = steps.Labels(store, config, keys)
        for name in steps.LABEL_TABLES:
            _tell(name, getattr(labels, name)())
    views = store.write_views()
    say(f"tables: {store.location}; DuckDB views: {views}")
    if failed:
        raise SourceError(f"{len(failed)} shards failed, the others are ingested: " + "; ".join(failed))
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


def _sql(store: Store, query: str | None) -> int:
    import duckdb

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


def _show(store: Store, table: str | None, rows: int) -> int:
    if table not in schemas.TABLES:
        raise StoreError(f"show: expected a table of {sorted(schemas.TABLES)}, found {table!r}")
    with pl.Config(tbl_rows=rows, tbl_cols=-1, fmt_str_lengths=40):
        frame = store.scan(schemas.TABLES[table]).head(rows).collect()
        say(str(frame.drop([c for c, t in frame.schema.items() if t == pl.Binary])))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
