"""The re-scoring schedule: off until somebody switches it on.

Belongs here: which runs score exactly what is due. Does not belong here: what is due (`pipelines.status`), and what comes
after the scores (`sensors`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import dagster as dg

from assets.jobs import EVERYTHING, INGEST, RELABEL, RESCORE
from assets.partitions import SHARDS
from assets.resources import Polyphony
from assets.scores import score_key
from pipelines import status
from pipelines.config import Config

RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
PARTITION = "dagster/partition"
REASON = "polyphony/reason"
THEN_RELABEL = {"polyphony/then": "relabel"}
"""Tag of re-scoring runs: when the last of them is finished, the labels are made again."""
UNFINISHED = [
    getattr(dg.DagsterRunStatus, s) for s in ("NOT_STARTED", "QUEUED", "STARTING", "STARTED", "CANCELING", "SUSPENDED")
]


def build_schedules(config: Config) -> list[dg.ScheduleDefinition]:
    """Return the schedules `rescoring` and `relabelling`, at the configuration's times."""
    loaded = {s.name for s in config.scorers}

    @dg.schedule(
        job_name=RESCORE,
        cron_schedule=config.automation.rescore_cron,
        execution_timezone=config.automation.timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Requests exactly the shards whose scores under the present revision of a scorer are missing or made "
        "from something else; the sensor relabel_after_rescoring then requests one relabel.",
    )
    def rescoring(context: dg.ScheduleEvaluationContext, polyphony: Polyphony) -> dg.SkipReason | list[dg.RunRequest]:
        due, problem = due_scores(polyphony)
        # The configuration is read anew at every tick, the assets are those that the code location was loaded with.
        if unloaded := [scorer for scorer, shards in due.items() if shards and scorer not in loaded]:
            due = {scorer: shards for scorer, shards in due.items() if scorer not in unloaded}
            new = f"not scored: {', '.join(unloaded)}, configured since the code location was loaded; reload it"
            problem = "; ".join(filter(None, [problem, new]))
        if problem:
            context.log.warning(problem)
        partitions = context.instance.get_dynamic_partitions(str(SHARDS.name))
        waiting = under_way(context.instance, partitions, list(due))
        left = {scorer: set(shards) - waiting[scorer] for scorer, shards in due.items()}
        if absent := sorted(set().union(*left.values()) - set(partitions)):
            problem = "; ".join(filter(None, [problem, _unregistered(absent)]))
            context.log.warning(_unregistered(absent))
        if requests := [r.request() for r in ranges(left, partitions)]:
            return requests
        if problem:
            return dg.SkipReason(problem)
        if any(due.values()):
            return dg.SkipReason("what is due is being scored by runs that are not finished")
        return dg.SkipReason("every catalogued shard has scores of the present revision of every scorer")

    relabelling = dg.ScheduleDefinition(
        name="relabelling",
        job_name=RELABEL,
        cron_schedule=config.automation.relabel_cron,
        execution_timezone=config.automation.timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Makes every label table again that is not current, also where no score was due (old weights came back, "
        "options changed), and finds the others unchanged, so that published tables stay fresh.",
    )
    return [rescoring, relabelling]


def due_scores(polyphony: Polyphony) -> tuple[dict[str, list[str]], str]:
    """Return the shards that are due by scorer, and what keeps that from being everything ('' if nothing does)."""
    config, store = polyphony.config, polyphony.store
    if store.catalogued_shards() is None:
        return {}, f"{store.location} has no catalogue, so no shard can be scored; run the job {INGEST}"
    due = status.due_scores(store, config)
    lost = [s.name for s in config.scorers if s.name not in due]
    return due, f"not scored: {', '.join(lost)}, whose files are missing (`python -m pipelines status`)" if lost else ""


def _unregistered(shards: Sequence[str]) -> str:
    named = ", ".join(shards[:5]) + (", ..." if len(shards) > 5 else "")
    return f"not scored: {len(shards)} shards that are no partitions ({named}); materialize raw_sources"


@dataclass(frozen=True)
class Range:
    """Neighbouring shards in the order of the instance's partitions, for which the same scorers are due."""

    scorers: tuple[str, ...]
    shards: tuple[str, ...]

    def request(self) -> dg.RunRequest:
        """Return the run that scores these shards by these scorers and nothing else."""
        first, last = self.shards[0], self.shards[-1]
        which = f"shard {first}" if len(self.shards) == 1 else f"{len(self.shards)} shards, {first} to {last}"
        return dg.RunRequest(
            # Tells apart the runs of one evaluation; the next one looks at what is due and at unfinished runs instead.
            run_key=f"{','.join(self.scorers)}:{first}:{last}",
            asset_selection=[score_key(s) for s in self.scorers],
            tags={
                RANGE_START: first,
                RANGE_END: last,
                REASON: f"scores of {', '.join(self.scorers)} are due: {which}",
                **THEN_RELABEL,
            },
        )


def ranges(due: Mapping[str, Collection[str]], partitions: Sequence[str]) -> list[Range]:
    """Return the fewest ranges of partitions, in their order, that hold what is due by scorer and nothing else."""
    of_shard: dict[str, tuple[str, ...]] = {}
    for scorer, shards in due.items():
        for shard in shards:
            of_shard[shard] = (*of_shard.get(shard, ()), scorer)
    found: list[Range] = []
    before: tuple[str, ...] = ()
    for shard in partitions:
        scorers = of_shard.get(shard, ())
        if scorers and scorers == before:
            found[-1] = Range(scorers, (*found[-1].shards, shard))
        elif scorers:
            found.append(Range(scorers, (shard,)))
        before = scorers
    return found


def under_way(instance: dg.DagsterInstance, partitions: Sequence[str], scorers: Sequence[str]) -> dict[str, set[str]]:
    """Return scorer -> shards that an unfinished run scores, whoever started it."""
    found: dict[str, set[str]] = {s: set() for s in scorers}
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        first = run.tags.get(RANGE_START, run.tags.get(PARTITION))
        last = run.tags.get(RANGE_END, first)
        if first not in partitions or last not in partitions:
            continue
        shards = partitions[partitions.index(first) : partitions.index(last) + 1]
        for scorer in scorers:
            chosen = run.asset_selection
            if score_key(scorer) in chosen if chosen is not None else run.job_name in (RESCORE, EVERYTHING):
                found[scorer].update(shards)
    return found
