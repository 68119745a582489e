"""Sensors that tell: failed runs and overdue tables, to the webhook of the configuration. Off until switched on.

Belongs here: when to tell, and in which words. Does not belong here: how a message is posted (`pipelines.webhook`).
"""

import datetime as dt
import json
import time
from typing import Any

import dagster as dg

from assets.resources import Polyphony
from pipelines import webhook
from pipelines.config import Config

PUBLISHED = tuple(dg.AssetKey(t) for t in ("active_scores", "consensus", "preferences", "leaderboard"))
"""What people read: these become overdue."""
MESSAGES_PER_TICK = 10
SECONDS_PER_TICK = 15.0
"""After which no further message is begun: a tick that takes a minute is cut off, and would tell all of them again."""
ERRORS = 5
ERROR_CHARACTERS = 600
_NO_WEBHOOK = dg.SkipReason(
    f"nobody is told: set {webhook.OPTION} in the configuration to a URL, or switch this sensor off"
)


def freshness(config: Config) -> dg.FreshnessPolicy:
    """Return the policy of published tables: overdue when not materialized for `automation.fresh_days` days."""
    return dg.FreshnessPolicy.time_window(fail_window=dt.timedelta(days=config.automation.fresh_days))


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Posts every run that fails from now on to automation.webhook: job, failed steps, errors, assets.",
)
def run_failure_alert(context: dg.SensorEvaluationContext, polyphony: Polyphony) -> dg.SensorResult | dg.SkipReason:
    """Tell of failed runs, each once and none never.

    Not a run failure sensor: where its evaluation fails, it goes on to the next run and the message is lost.

    Raises:
        WebhookError: the first message could not be posted; the next tick tries it again.
    """
    url, cursor = polyphony.config.automation.webhook, context.cursor
    if not url:
        return _NO_WEBHOOK
    if cursor is None:
        newest = context.instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1)
        return dg.SensorResult(skip_reason="runs that fail from now on are told", cursor=newest.cursor)
    told, started = 0, time.monotonic()
    while told < MESSAGES_PER_TICK and (not told or time.monotonic() - started < SECONDS_PER_TICK):
        found = context.instance.fetch_run_status_changes(
            dg.DagsterEventType.RUN_FAILURE, limit=1, cursor=cursor, ascending=True
        )
        if not found.records:
            break
        failure = found.records[0].event_log_entry
        run = context.instance.get_run_by_id(failure.run_id)
        if run is not None and _is_of_this_location(context, run):
            try:
                webhook.post(url, failure_message(context.instance, run, failure))
            except webhook.WebhookError as error:
                if not told:
                    raise
                # What is told is not told again; the next tick begins with this one, and fails if it must.
                context.log.error(str(error))
                break
            told += 1
        cursor = found.cursor
    return dg.SensorResult(skip_reason=f"{told} failed runs told" if told else "no run has failed", cursor=cursor)


def _is_of_this_location(context: dg.SensorEvaluationContext, run: dg.DagsterRun) -> bool:
    of_run = run.remote_job_origin and run.remote_job_origin.repository_origin.code_location_origin.location_name
    of_sensor = context.code_location_origin and context.code_location_origin.location_name
    return of_run == of_sensor


def failure_message(instance: dg.DagsterInstance, run: dg.DagsterRun, failure: dg.EventLogEntry) -> dict[str, Any]:
    """Return what is told of a failed run: steps that failed, their innermost errors, the assets they were to make."""
    failed = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE).records
    planned = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    steps, errors = [], []
    for record in failed:
        event = record.event_log_entry.get_dagster_event()
        steps.append(str(event.step_key))
        errors.append(_innermost(event.step_failure_data.error) or str(event.message))
    if not steps:
        # The process was killed, or the run could not be started.
        event = failure.get_dagster_event()
        error = getattr(event.event_specific_data, "error", None)
        errors.append(_innermost(error) or event.message or "no error was recorded")
    events = [r.event_log_entry.get_dagster_event() for r in planned.records]
    assets = [e.asset_key.to_user_string() for e in events if e.asset_key and (not steps or e.step_key in steps)]
    again = " It is started again." if run.tags.get("dagster/will_retry") == "true" else ""
    where = f" in {', '.join(steps)}" if steps else ""
    return {
        "text": f"Polyphony: job {run.job_name} failed{where}: {errors[0]}{again} (run {run.run_id})",
        "kind": "run_failure",
        "job": run.job_name,
        "run_id": run.run_id,
        "failed_steps": steps,
        "errors": errors[:ERRORS],
        "assets": sorted(set(assets)),
    }


def _innermost(error: Any) -> str:
    """Return the first characters of what an asset body raised; Dagster wraps it."""
    if error is None:
        return ""
    while error.cause is not None:
        error = error.cause
    return error.message.strip()[:ERROR_CHARACTERS]


@dg.sensor(
    minimum_interval_seconds=300,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=f"Posts to automation.webhook once when one of {', '.join(k.to_user_string() for k in PUBLISHED)} has not "
    "been materialized for automation.fresh_days days, and once when it has been again.",
)
def freshness_alert(context: dg.SensorEvaluationContext, polyphony: Polyphony) -> dg.SensorResult | dg.SkipReason:
    """Tell what has become overdue, else what has recovered: one message per tick, so that none is sent twice.

    Whether a table is overdue is what Dagster's own daemon finds by the policies; the cursor holds what people know.

    Raises:
        WebhookError: the message could not be posted; the next tick tries again.
    """
    automation = polyphony.config.automation
    if not automation.webhook:
        return _NO_WEBHOOK
    if not context.instance.freshness_enabled:
        return dg.SkipReason("dagster.yaml has `freshness: enabled: false`, so nobody looks what is overdue; remove it")
    states = context.instance.get_freshness_state_records(PUBLISHED)
    overdue = {k.to_user_string() for k, record in states.items() if record.freshness_state.value == "FAIL"}
    known = set(json.loads(context.cursor or "[]"))
    late, back = sorted(overdue - known), sorted(known - overdue)
    if not late and not back:
        return dg.SkipReason(f"nothing new; overdue: {', '.join(sorted(overdue)) or 'nothing'}")
    kind, tables = ("overdue", late) if late else ("recovered", back)
    what = f"overdue after {automation.fresh_days:g} days" if late else "made again"
    text = f"Polyphony: {what}: {'; '.join(_age(context.instance, t) for t in tables)}"
    webhook.post(automation.webhook, {"text": text, "kind": kind, "assets": tables})
    known = known | set(late) if late else known - set(back)
    return dg.SensorResult(skip_reason=text, cursor=json.dumps(sorted(known)))


def _age(instance: dg.DagsterInstance, table: str) -> str:
    event = instance.get_latest_materialization_event(dg.AssetKey(table.split("/")))
    return table if event is None else f"{table}, last made {(time.time() - event.timestamp) / 86_400:.1f} days ago"
