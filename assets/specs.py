"""What an asset says of itself before anybody materializes it: group, owner, kinds, tags, version, columns, place, checks.

Belongs here: the arguments of asset decorators that follow from a table and the configuration. Does not belong here: what a
materialization found (`metadata`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import dagster as dg

from assets import metadata as meta
from pipelines import checks, lineage, schemas
from pipelines.config import Config
from pipelines.tables import Store

GROUPS = ("ingest", "scores", "labels", "caches", "training", "evaluation", "store")
Device = Literal["cpu", "gpu"]


class Specs:
    """Arguments of `dg.asset` and `dg.AssetSpec` under a configuration."""

    def __init__(self, config: Config) -> None:
        self.config, self._store = config, Store(config.store_location)
        self.scorers = [s.name for s in config.scorers]

    def of(
        self,
        group: str,
        *,
        kinds: Iterable[str],
        code_version: str,
        description: str | None = None,
        device: Device = "cpu",
        tags: dict[str, str] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Return the arguments of an asset of this group that is no table; its docstring may be its description."""
        assert group in GROUPS, group
        return {
            "group_name": group,
            "kinds": set(kinds),
            "code_version": code_version,
            "owners": [self.config.automation.owners.get(group, f"team:{group}")],
            "tags": {"polyphony/device": device, **(tags or {})},
            **({"description": description} if description else {}),
            **more,
        }

    def table(
        self,
        table: schemas.Table,
        group: str,
        *,
        kinds: Iterable[str] = ("polars", "parquet"),
        code_version: str,
        description: str | None = None,
        partition: str = "",
        metadata: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Return the arguments of an asset that is a table, or a part of one; partition: the path of that part."""
        of_scorers = table.of(self.scorers)
        is_whole = table.cut_by == "whole" or partition != ""
        uri = self._store.data_path(table.name, partition or "all") if is_whole else self._store.path(table.name)
        facts = {**meta.spec_metadata(of_scorers), "dagster/uri": uri, **self._lineage(table.name), **(metadata or {})}
        return self.of(
            group,
            kinds=kinds,
            code_version=code_version,
            description=description or f"One row per {table.row}.",
            tags={"polyphony/cut_by": table.cut_by.replace("/", "."), **(tags or {})},
            metadata=facts,
            **more,
        )

    def _lineage(self, table: str) -> dict[str, Any]:
        columns = lineage.lineage(table, self.scorers) if table in lineage.TABLES else {}
        if not columns:
            return {}
        return {
            "dagster/column_lineage": dg.TableColumnLineage(
                {
                    column: [dg.TableColumnDep(dg.AssetKey(asset.split("/")), source) for asset, source in sources]
                    for column, sources in columns.items()
                    if sources
                }
            )
        }


def check_specs(key: dg.CoercibleToAssetKey, table: schemas.Table) -> Sequence[dg.AssetCheckSpec]:
    """Return the checks that a materialization of this asset makes of a table."""
    return [
        dg.AssetCheckSpec(name, asset=key, blocking=is_blocking, description=checks.MEANING[name])
        for name, is_blocking in checks.names(table.name)
    ]
