"""The checks of a materialization as Dagster shows them, and `inputs_current`, which can be run on its own at any time.

Belongs here: from findings to check results. Does not belong here: what is looked at (`pipelines.checks`, `.status`).
"""

from collections.abc import Iterable, Iterator

import dagster as dg

from assets import metadata as meta
from assets.resources import Polyphony
from pipelines import checks, schemas, status, steps
from pipelines.config import Config
from pipelines.tables import Built, Store

INPUTS_CURRENT = "inputs_current"


def results(
    store: Store, config: Config, key: "dg.CoercibleToAssetKey", table: schemas.Table, builts: Iterable[Built]
) -> list[dg.AssetCheckResult]:
    """Return what the checks find in the partitions of a table that one materialization made or found."""
    partitions = [b.manifest.partition for b in builts]
    return [result(key, finding) for finding in checks.of_table(store, config, table.name, partitions)]


def result(key: "dg.CoercibleToAssetKey", finding: checks.Finding) -> dg.AssetCheckResult:
    """Return a finding as a check result: an error where it must stop what reads the table, else a warning."""
    return dg.AssetCheckResult(
        asset_key=dg.AssetKey.from_coercible(key),
        check_name=finding.name,
        passed=finding.passed,
        severity=dg.AssetCheckSeverity.ERROR if finding.blocking else dg.AssetCheckSeverity.WARN,
        description=finding.description,
        metadata=meta.numbers(finding.numbers),
    )


def can_be_read(found: Iterable[dg.AssetCheckResult]) -> bool:
    """Return whether a table's file is what its commit says, so that what is shown of it can be read from it.

    Of a damaged one the check is to be told, and not an error of whoever reads it.
    """
    return all(r.passed for r in found if r.check_name == "schema")


def build_checks() -> list[dg.AssetChecksDefinition]:
    """Return the checks that are no part of a materialization."""

    @dg.multi_asset_check(
        specs=[
            dg.AssetCheckSpec(
                INPUTS_CURRENT,
                asset=name,
                description="Made from the present scores, votes and options; else it says what to refresh.",
            )
            for name in steps.LABEL_TABLES
        ],
        name=INPUTS_CURRENT,
        can_subset=True,
    )
    def inputs_current(context: dg.AssetCheckExecutionContext, polyphony: Polyphony) -> Iterator[dg.AssetCheckResult]:
        for name, why in status.inputs_current(polyphony.store, polyphony.config).items():
            if dg.AssetCheckKey(dg.AssetKey(name), INPUTS_CURRENT) not in context.selected_asset_check_keys:
                continue
            yield dg.AssetCheckResult(
                asset_key=name,
                check_name=INPUTS_CURRENT,
                passed=why is None,
                severity=dg.AssetCheckSeverity.WARN,
                description=why or "made from the present inputs",
            )

    return [inputs_current]
