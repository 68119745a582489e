"""Raw files -> votes, images, prompts by shard -> catalogue."""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from assets import checks, forms
from assets import metadata as meta
from assets.partitions import EVERY_SHARD, SHARDS
from assets.resources import Polyphony
from assets.specs import Specs, check_specs
from pipelines import accounting as accounting_of
from pipelines import catalogue as catalogue_of
from pipelines import ingest, schemas
from pipelines.config import Config
from pipelines.sources import SourceError
from pipelines.tables import Built
from pipelines.world import raw

SHARD_TABLES = ingest.TABLES
CATALOGUE_TABLES = catalogue_of.TABLES
RAW = "raw_sources"


def build_ingest(config: Config) -> list[dg.AssetsDefinition]:
    """Return the raw files, the tables of a shard, what crosses shards, and the account of it."""
    specs = Specs(config)
    return [_raw_sources(specs), _ingested(specs), _catalogue(specs), _accounting(specs)]


def _raw_sources(specs: Specs) -> dg.AssetsDefinition:
    @dg.asset(**specs.of("ingest", kinds=("parquet", "json"), code_version=ingest.CODE_VERSION))
    def raw_sources(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        """The raw files of all sources; writes the small world where it is configured, and registers every shard."""
        config = polyphony.config
        written = config.world is not None and raw.write_world(config.world_folder, config.world)
        keys = polyphony.shard_keys()
        assert SHARDS.name is not None
        gone = [k for k in context.instance.get_dynamic_partitions(SHARDS.name) if k not in set(keys)]
        for key in gone:
            # A range of shards must not hold one without a file; its events and tables stay.
            context.instance.delete_dynamic_partition(SHARDS.name, key)
        context.instance.add_dynamic_partitions(SHARDS.name, keys)
        context.log.info(
            f"{len(keys)} shards of {len(config.sources)} sources"
            + (f", {len(gone)} partitions without a file removed" if gone else "")
            + (", small world written" if written else "")
        )
        return dg.MaterializeResult(metadata={"shards": len(keys), meta.REUSED: dg.MetadataValue.bool(not written)})

    return raw_sources


def _ingested(specs: Specs) -> dg.AssetsDefinition:
    @dg.multi_asset(
        specs=[
            dg.AssetSpec(
                t.name,
                deps=[RAW],
                skippable=True,
                **specs.table(t, "ingest", code_version=ingest.CODE_VERSION),
            )
            for t in SHARD_TABLES
        ],
        check_specs=[c for t in SHARD_TABLES for c in check_specs(t.name, t)],
        partitions_def=SHARDS,
        backfill_policy=EVERY_SHARD,
    )
    def ingested(
        context: dg.AssetExecutionContext, config: forms.ShardOptions, polyphony: Polyphony
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        """Ingest the selected shards; a bad file fails the run after the other shards are done."""
        present, store = polyphony.config, polyphony.store
        listed = polyphony.shards()
        shards, plans = {s.key: s for s in listed}, ingest.plans(present, listed)
        chosen = forms.choose(
            context,
            config,
            lambda key: key in shards and ingest.is_ingested(store, plans[shards[key].source], shards[key]),
        )
        selected, done = set(context.partition_keys), {t.name: list[Built]() for t in SHARD_TABLES}
        failed: list[str] = []
        for i, key in enumerate(chosen.keys):
            if key not in shards:
                failed.append(f"{key}: no file of the configured sources has this shard any more")
                continue
            try:
                of_shard = ingest.ingest_shard(store, plans[shards[key].source], shards[key], context.log.info)
            except SourceError as error:
                failed.append(str(error))
                continue
            for table in SHARD_TABLES:
                done[table.name].append(of_shard[table.name])
            votes = of_shard["votes"]
            context.log.info(
                f"{i + 1}/{len(chosen.keys)} {key}: {votes.manifest.rows} votes"
                + (", unchanged" if votes.is_reused else "")
            )
        # Where files are bad, what is done of the others is shown all the same.
        told = chosen if not failed else forms.ShardChoice(context, chosen.keys, is_whole=False)
        for table in SHARD_TABLES:
            builts = done[table.name]
            for built in builts:
                told.tell(table.name, built.manifest.partition, meta.partition_metadata(store, table, built))
            if config.dry_run:
                # A check of nothing would pass, in place of what the last run found.
                builts = [Built(m, True) for m in store.manifests(table.name) if m.partition in selected]
            found = checks.results(store, present, table.name, table, builts)
            if told.is_whole:
                metadata = meta.of_builts(store, table, builts)
                yield dg.MaterializeResult(asset_key=table.name, metadata=metadata, check_results=found)
            else:
                yield from found
        if failed:
            raise dg.Failure(f"{len(failed)} of {len(chosen.keys)} shards failed: " + "; ".join(failed))

    return ingested


def _catalogue(specs: Specs) -> dg.AssetsDefinition:
    @dg.multi_asset(
        specs=[
            dg.AssetSpec(
                t.name,
                deps=[s.name for s in SHARD_TABLES],
                **specs.table(t, "ingest", code_version=catalogue_of.CODE_VERSION),
            )
            for t in CATALOGUE_TABLES
        ],
        check_specs=[c for t in CATALOGUE_TABLES for c in check_specs(t.name, t)],
    )
    def catalogue(context: dg.AssetExecutionContext, polyphony: Polyphony) -> Iterator[dg.MaterializeResult]:
        """What crosses shards: owners, splits, repeated votes, names, pairs and preference cycles."""
        config, store = polyphony.config, polyphony.store
        keys, absent = ingest.ingested(store, polyphony.shards())
        if absent:
            context.log.warning(f"{len(absent)} shards are not ingested and not in the catalogue: {', '.join(absent)}")
        built = catalogue_of.build(store, keys, config.splits)
        context.log.info(", ".join(f"{b.manifest.rows} {name.removeprefix('catalogue_')}" for name, b in built.items()))
        for table in CATALOGUE_TABLES:
            yield dg.MaterializeResult(
                asset_key=table.name,
                metadata=meta.of_builts(store, table, [built[table.name]]),
                check_results=checks.results(store, config, table.name, table, [built[table.name]]),
            )

    return catalogue


def _accounting(specs: Specs) -> dg.AssetsDefinition:
    table = schemas.ACCOUNTING

    @dg.asset(
        deps=[t.name for t in (*SHARD_TABLES, *CATALOGUE_TABLES)],
        check_specs=check_specs("accounting", table),
        **specs.table(
            table,
            "ingest",
            code_version=accounting_of.CODE_VERSION,
            description="What came in per source, what counts, and what does not.",
        ),
    )
    def accounting(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        config, store, listed = polyphony.config, polyphony.store, polyphony.shards()
        keys = set(catalogue_of.shard_keys(store))
        shards = [s for s in listed if s.key in keys]
        layouts = {name: how.source.layout for name, how in ingest.plans(config, listed).items()}
        built = accounting_of.build(store, shards, layouts)
        found = checks.results(store, config, table.name, table, [built])
        if not checks.can_be_read(found):
            return dg.MaterializeResult(metadata=meta.of_builts(store, table, [built]), check_results=found)
        report = store.read(table)
        total = report.filter(pl.col("source") == accounting_of.ALL).row(0, named=True)
        context.log.info(
            ", ".join(f"{total[c]} {c.replace('_', ' ')}" for c in ("rows", "votes_ok", "pairs", "images", "cycles"))
        )
        numbers = {k: v for k, v in total.items() if isinstance(v, int | float)}
        return dg.MaterializeResult(
            metadata={
                **meta.of_builts(store, table, [built]),
                **meta.numbers(numbers),
                "report": dg.MetadataValue.md(accounting_of.as_markdown(report)),
                "plot": meta.picture(accounting_of.plot(report), "What came in, and what counts"),
            },
            check_results=found,
        )

    return accounting
