"""What there is in the store, what is out of date, what failed, and what to press."""

import dagster as dg

from assets import metadata as meta
from assets.resources import Polyphony
from assets.specs import Specs
from pipelines import status
from pipelines.config import Config


def build_store(config: Config) -> list[dg.AssetsDefinition]:
    """Return the asset that looks at the store."""
    specs = Specs(config)

    @dg.asset(
        deps=["preferences", "leaderboard"],
        **specs.of("store", kinds=("markdown",), code_version="1"),
    )
    def store_status(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        """Per table: shards done, out of date and failed, and what to press; run it whenever you want to know."""
        from trainers import status as torch_status

        present, store = polyphony.config, polyphony.store
        lines = [*status.lines(store, present), *torch_status.lines(store, present)]
        context.log.info("\n" + status.text(lines))
        counts = {
            "tables_current": sum(not line.press for line in lines),
            "tables_to_do": sum(bool(line.press) for line in lines),
            "partitions_stale": sum(len(line.stale) for line in lines),
            "partitions_failed": sum(len(line.failed) for line in lines),
        }
        # The whole table is long, and what there is to do lies anywhere in it.
        left = [line for line in lines if line.press]
        to_do = status.markdown(left) if left else f"nothing: all {len(lines)} tables are current"
        shown = {"to_do": dg.MetadataValue.md(to_do), "status": dg.MetadataValue.md(status.markdown(lines))}
        return dg.MaterializeResult(metadata={**shown, **meta.numbers(counts)})

    return [store_status]
