"""What people see of a materialization: rows, rejected rows by reason, whether anything was computed, small pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
from PIL import Image

from pipelines import schemas
from pipelines.config import Config
from pipelines.tables import Built, Store

REUSED = "polyphony/is_unchanged"
"""Metadata key: true where everything lay there already, made from the same inputs."""
MAX_PICTURE_BYTES = 50_000
DIGITS = 6
"""Of a fraction that is shown."""


def column_schema(table: schemas.Table) -> dg.TableSchema:
    """Return a table's columns for Dagster's column tab."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                c.name,
                str(c.dtype),
                # The UI takes what stands in angle brackets for HTML.
                c.meaning.replace("<", "&lt;"),
                dg.TableColumnConstraints(nullable=c.nullable, unique=(c.name,) == table.key),
            )
            for c in table.columns
        ]
    )


def spec_metadata(table: schemas.Table) -> dict[str, Any]:
    """Return what is known of a table before it is materialized."""
    return {"dagster/column_schema": column_schema(table), "dagster/table_name": table.name}


def of_builts(store: Store, table: schemas.Table, builts: Iterable[Built]) -> dict[str, Any]:
    """Return the metadata of the partitions that one materialization made or found; the row count is the asset's."""
    builts = list(builts)
    rows = sum(b.manifest.rows for b in builts)
    if builts and table.cut_by.endswith("shard"):
        # What the asset holds is more than what one run did of it.
        rows = sum(m.rows for m in store.manifests(table.name, builts[0].manifest.partition.rpartition("/")[0]))
    return {"dagster/row_count": rows, **_of_run(store, table, builts)}


def _of_run(store: Store, table: schemas.Table, builts: Sequence[Built]) -> dict[str, Any]:
    manifests = [b.manifest for b in builts]
    statuses: dict[str, int] = {}
    for manifest in manifests:
        for status, n in manifest.rows_by_status.items():
            statuses[status] = statuses.get(status, 0) + n
    rejected = {k: v for k, v in statuses.items() if k != "ok"}
    uri = store.data_path(table.name, manifests[0].partition) if len(manifests) == 1 else store.path(table.name)
    return {
        "dagster/uri": uri,
        "rows_of_run": sum(m.rows for m in manifests),
        "bytes": sum(m.bytes for m in manifests),
        "seconds": float(sum(b.manifest.seconds for b in builts if not b.is_reused)),
        "fingerprint": manifests[0].fingerprint if len(manifests) == 1 else f"{len(manifests)} partitions",
        "rejected_rows": sum(rejected.values()),
        # Of nothing it cannot be said that it lay there already.
        **({REUSED: dg.MetadataValue.bool(all(b.is_reused for b in builts))} if builts else {}),
        **({"rejected_by_reason": dg.MetadataValue.json(rejected)} if rejected else {}),
    }


def partition_metadata(store: Store, table: schemas.Table, built: Built) -> dict[str, Any]:
    """Return the metadata of one shard of a table."""
    return {**_of_run(store, table, [built]), "dagster/partition_row_count": built.manifest.rows}


def picture(png: bytes, name: str) -> dg.MarkdownMetadataValue:
    """Return a PNG for the metadata pane; every copy lies in the event log, so a large one is shown smaller, as JPEG."""
    data, kind = png, "png"
    scale = 1.0
    while len(data) > MAX_PICTURE_BYTES:
        image = Image.open(io.BytesIO(png)).convert("RGB")
        buffer = io.BytesIO()
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85, subsampling=0)
        data, kind, scale = buffer.getvalue(), "jpeg", scale * 0.8
    return dg.MetadataValue.md(f"![{name}](data:image/{kind};base64,{base64.b64encode(data).decode()})")


def page(store: Store, config: Config, name: str) -> dg.MetadataValue:
    """Return a page of pairs as a link where somebody serves them (automation.pages_url), else as its path."""
    base = config.automation.pages_url
    return (
        dg.MetadataValue.url(f"{base.rstrip('/')}/{name}") if base else dg.MetadataValue.path(store.path("pairs", name))
    )


def numbers(values: Mapping[str, float | int | None]) -> dict[str, dg.MetadataValue]:
    """Return the numbers that are known as metadata that plots over time; counts whole, fractions as DIGITS say."""
    return {k: dg.MetadataValue.float(_rounded(float(v))) for k, v in values.items() if v is not None}


def _rounded(value: float) -> float:
    return value if value.is_integer() else float(f"{value:.{DIGITS}g}")
