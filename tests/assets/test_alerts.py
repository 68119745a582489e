"""Failed runs and overdue tables are told to the webhook, once each."""

import http.server
import json
import threading
import time

import dagster as dg
import pytest

import assets.alerts
from assets.alerts import PUBLISHED, freshness, freshness_alert, run_failure_alert
from assets.resources import Polyphony
from pipelines import webhook
from pipelines.config import AutomationConfig, small_world

PREFERENCES = dg.AssetKey("preferences")


class Listener(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            self.server.told.append(message)
        self.send_response(status)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def listener():
    """A server that keeps what it is told; answers 200, or what `statuses` holds."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        server.told, server.statuses = [], []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Alerts:
    """A sensor with its cursor on an instance of its own, as the daemon keeps it: a failed tick changes nothing."""

    def __init__(self, sensor, url, folder):
        self.sensor, self.folder, self.cursor = sensor, folder, None
        self.instance = dg.DagsterInstance.local_temp(str(folder))
        automation = AutomationConfig(webhook=url, fresh_days=3)
        self.config = small_world(folder).model_copy(update={"automation": automation})

    def tick(self):
        file = self.folder / "polyphony.json"
        file.write_text(self.config.model_dump_json())
        resources = {"polyphony": Polyphony(config_file=str(file))}
        with dg.build_sensor_context(self.instance, cursor=self.cursor, resources=resources) as context:
            found = self.sensor.evaluate_tick(context)
        self.cursor = found.cursor
        return found.skip_message


@pytest.fixture
def alerts(listener, tmp_path, monkeypatch):
    monkeypatch.setattr(webhook, "WAITS", (0.0,))

    def over(sensor):
        return Alerts(sensor, f"http://127.0.0.1:{listener.server_port}/hook", tmp_path)

    return over


# --- failed runs ---------------------------------------------------------------------------------------------------


@dg.asset
def good():
    pass


@dg.asset(deps=[good])
def bad():
    raise ValueError("column 'label_0' is missing in votes.parquet")


def fail(instance, assets=(good, bad)):
    return dg.materialize(list(assets), instance=instance, raise_on_error=False).run_id


def test_a_failed_run_is_told_once_with_its_step_its_error_and_its_asset(alerts, listener):
    sensor = alerts(run_failure_alert)
    fail(sensor.instance)
    assert sensor.tick() == "runs that fail from now on are told"
    run = fail(sensor.instance)
    dg.materialize([good], instance=sensor.instance)
    sensor.tick()
    (message,) = listener.told
    assert message["text"] == (
        f"Polyphony: job __ephemeral_asset_job__ failed in bad: ValueError: column 'label_0' is missing in votes.parquet (run {run})"
    )
    assert (message["kind"], message["run_id"], message["job"]) == ("run_failure", run, "__ephemeral_asset_job__")
    assert (message["failed_steps"], message["assets"]) == (["bad"], ["bad"])
    assert message["errors"] == ["ValueError: column 'label_0' is missing in votes.parquet"]
    assert sensor.tick() == "no run has failed"
    assert len(listener.told) == 1


def test_a_run_that_no_step_failed_in_is_told_with_why_it_ended(alerts, listener):
    sensor = alerts(run_failure_alert)
    sensor.tick()
    job = dg.define_asset_job("train").resolve(asset_graph=dg.Definitions(assets=[good]).resolve_asset_graph())
    run = sensor.instance.create_run_for_job(job, tags={"dagster/will_retry": "true"})
    sensor.instance.report_run_failed(run, "the run worker was killed")
    sensor.tick()
    (message,) = listener.told
    assert "job train failed: the run worker was killed It is started again." in message["text"]
    assert message["failed_steps"] == []


def test_a_message_that_cannot_be_posted_fails_the_tick_and_is_posted_by_a_later_one(alerts, listener):
    sensor = alerts(run_failure_alert)
    sensor.tick()
    runs = [fail(sensor.instance) for _ in range(3)]
    listener.statuses = [500] * 3
    with pytest.raises(webhook.WebhookError, match=r"127\.0\.0\.1 answered 500"):
        sensor.tick()
    listener.statuses = [200, 500, 500, 500]
    sensor.tick()
    assert [m["run_id"] for m in listener.told] == runs[:1], "the second one could not be posted"
    sensor.tick()
    assert [m["run_id"] for m in listener.told] == runs


def test_a_slow_service_is_told_one_message_per_tick_before_the_tick_is_cut_off(alerts, listener, monkeypatch):
    monkeypatch.setattr(assets.alerts, "SECONDS_PER_TICK", 0.0)
    sensor = alerts(run_failure_alert)
    sensor.tick()
    runs = [fail(sensor.instance) for _ in range(2)]
    for told in (runs[:1], runs):
        assert sensor.tick() == "1 failed runs told"
        assert [m["run_id"] for m in listener.told] == told
    assert sensor.tick() == "no run has failed"


@pytest.mark.parametrize("sensor", [run_failure_alert, freshness_alert])
def test_without_a_webhook_the_tick_says_which_option_to_set(alerts, sensor):
    found = alerts(sensor)
    found.config = found.config.model_copy(update={"automation": AutomationConfig()})
    assert "set automation.webhook" in found.tick()
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED


# --- freshness -----------------------------------------------------------------------------------------------------


def states(instance, **of):
    """Record what the freshness daemon finds of tables."""
    from dagster._core.definitions.freshness import FreshnessState, FreshnessStateChange

    for table, state in of.items():
        change = FreshnessStateChange(
            key=dg.AssetKey(table),
            new_state=FreshnessState(state),
            previous_state=FreshnessState.UNKNOWN,
            state_change_timestamp=time.time(),
        )
        instance._report_runless_asset_event(change)


def test_the_policy_fails_after_the_configurations_days(tmp_path):
    config = small_world(tmp_path).model_copy(update={"automation": AutomationConfig(fresh_days=1.5)})
    assert freshness(config).fail_window.to_timedelta().total_seconds() == 1.5 * 86_400
    assert PREFERENCES in PUBLISHED


def test_an_overdue_table_is_told_once_and_so_is_its_recovery(alerts, listener):
    sensor = alerts(freshness_alert)
    assert sensor.tick() == "nothing new; overdue: nothing"
    sensor.instance.report_runless_asset_event(dg.AssetMaterialization(PREFERENCES))
    states(sensor.instance, preferences="FAIL", consensus="PASS", leaderboard="UNKNOWN", votes="FAIL")
    sensor.tick()
    (message,) = listener.told
    assert (message["kind"], message["assets"]) == ("overdue", ["preferences"])
    assert message["text"] == "Polyphony: overdue after 3 days: preferences, last made 0.0 days ago"
    assert sensor.tick() == "nothing new; overdue: preferences"

    states(sensor.instance, preferences="PASS", consensus="FAIL")
    sensor.tick()
    sensor.tick()
    assert [(m["kind"], m["assets"]) for m in listener.told[1:]] == [
        ("overdue", ["consensus"]),
        ("recovered", ["preferences"]),
    ]
    sensor.tick()
    assert len(listener.told) == 3


def test_an_overdue_table_that_could_not_be_told_is_told_later(alerts, listener):
    sensor = alerts(freshness_alert)
    states(sensor.instance, preferences="FAIL")
    listener.statuses = [500] * 3
    with pytest.raises(webhook.WebhookError):
        sensor.tick()
    sensor.tick()
    assert [m["assets"] for m in listener.told] == [["preferences"]]
