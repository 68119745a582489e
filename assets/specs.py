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
MEANING = {
    "votes": "What people chose, as the source recorded it; a vote that does not count says why.",
    "images": "Images by their bytes, with size and format; one that cannot be used says why.",
    "image_names": "Which image a source means by its own name of it.",
    "prompts": "Prompts, their texts normalised.",
    "catalogue_images": "Which shard caches an image that lies in several.",
    "catalogue_names": "The bytes behind a name, for votes of releases that have no bytes.",
    "catalogue_prompts": "One split per prompt over all sources, so that no test prompt is trained on.",
    "catalogue_scorables": "What the scorers score, and which shard does it.",
    "catalogue_votes": "Votes that repeat others, or whose images only another shard knows.",
    "catalogue_pairs": "What people say of a pair: how many voted, their mean, and preference cycles.",
    "scorer_report": "How right the active scores are about human votes, and how they are distributed.",
    "scorer_correlation": "How alike two scorers are.",
    "margins": "The scorers' verdicts beside each other: both scores of a pair, of which every label is made.",
    "calibration": "How far a difference of scores is a probability that people agree; weights of the ensemble.",
    "reliability": "Calibration curves: how often people choose the favoured image, by its probability.",
    "consensus": "The scorers' majority vote (BalancedDPO), who voted how, and simpler ways to one label.",
    "consensus_report": "How often a consensus agrees with people, by how united the scorers are.",
    "smoothed": "Preferences as probabilities instead of 0 or 1 (SmPO): published form and calibrated ones.",
    "minority": "How likely a vote is against what most people would say (Adaptive-DPO: c, v, u).",
    "annotators": "How reliable a person's votes are, with interval, and how far the first place draws them.",
    "rater_agreement": "How far people agree with each other: Krippendorff's alpha, and the pull of the first place.",
    "preferences": "What training and analysts read: votes, scores and labels of every pair; why some are excluded.",
    "annotator_groups": "Groups of people with tastes alike, by how their votes weigh the scorers.",
    "pair_groups": "The group whose taste a pair shows: that of most who voted for the humans' side.",
    "frozen_sample": "The pairs on which new revisions of scorers are compared with old ones; drawn once.",
    "frozen_labels": "What every scorer and the consensus chose on the frozen sample.",
    "drift": "What new revisions changed on the frozen sample: accuracy of scorers, labels of the consensus.",
    "latents": "Images as training reads them, each encoded once by the shard that owns it.",
    "prompt_embeddings": "Prompts as training reads them, the empty one too.",
}
"""What tables that are one asset, or one per shard, are for, in a sentence."""


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
        tags: dict[str, str] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Return the arguments of an asset that is a table, or a part of one; partition: the path of that part.

        Raises:
            KeyError: there is neither a description nor a MEANING of the table.
        """
        of_scorers = table.of(self.scorers)
        is_whole = table.cut_by == "whole" or partition != ""
        uri = self._store.data_path(table.name, partition or "all") if is_whole else self._store.path(table.name)
        facts = {**meta.spec_metadata(of_scorers), "dagster/uri": uri, **self._lineage(table.name)}
        return self.of(
            group,
            kinds=kinds,
            code_version=code_version,
            description=description or f"{MEANING[table.name]} One row per {table.row}.",
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
