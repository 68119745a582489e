"""What is started as a person starts it: homes with a finished store, processes over them, Dagster's GraphQL."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest

from pipelines.config import ScorerConfig, small_world
from pipelines.tables import Store

ROOT = Path(__file__).parents[2]
LOCATION = "assets.definitions"
"""Name of the code location, as `-m assets.definitions` calls it."""
FINISHED = {"SUCCESS", "FAILURE", "CANCELED"}
JUDGE = '''
"""A judge that likes bright pictures, and takes its time while it is held."""

import time
from pathlib import Path


def brightness(device, hold=""):
    def judge(images, prompts):
        while hold and Path(hold).exists():
            Path(hold + ".reached").touch()
            time.sleep(0.05)
        return [sum(image.convert("L").resize((1, 1)).getdata()) / 255 for image in images]

    return judge
'''


def _eventually(found, seconds, what):
    """Return found() as soon as it is true; after some seconds fail with what was waited for."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, f"after {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.1)
    return result


@pytest.fixture(scope="session")
def eventually():
    return _eventually


@pytest.fixture(scope="session")
def left_after():
    """Return left(found, seconds): what found() still returns after some seconds; nothing as soon as it is nothing."""

    def left(found, seconds):
        deadline = time.monotonic() + seconds
        while (remaining := found()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return remaining

    return left


def _default_signals():
    # A shell's background jobs ignore interrupts, and so would what they start.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Home:
    """A folder with a configuration file, a store and Dagster's instance, for processes of their own."""

    def __init__(self, folder, config):
        self.folder = folder
        self.config_file = folder / "config.json"
        self.dagster_home = folder / "dagster_home"
        self.dagster_home.mkdir(parents=True)
        shutil.copy(ROOT / "dagster.yaml", self.dagster_home)
        (folder / "held_judge.py").write_text(JUDGE)
        self.variables = {
            "POLYPHONY_CONFIG": str(self.config_file),
            "POLYPHONY_HOME": str(folder),
            "DAGSTER_HOME": str(self.dagster_home),
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.configure(config)

    def configure(self, config):
        """Write the configuration that processes started from here on read."""
        self.config = config
        self.config_file.write_text(config.model_dump_json(indent=1))

    @property
    def store(self):
        return Store(self.config.store_location)

    def start(self, *command, log="log.txt"):
        """Start a command of the environment in a session of its own; what it says goes to a file of the home."""
        programs = Path(sys.executable).parent
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        with (self.folder / log).open("a") as file:
            return subprocess.Popen(
                [programs / command[0], *command[1:]],
                cwd=ROOT,
                env={**os.environ, **self.variables, "PATH": path},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_default_signals,
            )

    def said(self, log="log.txt"):
        """Return the end of what a command said."""
        return (self.folder / log).read_text()[-4000:]

    def run(self, *module, seconds=300):
        """Run a module to its end and return what it said."""
        log = "_".join(module).replace("/", "_") + ".txt"
        process = self.start("python", "-u", "-m", *module, log=log)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        assert status == 0, self.said(log)
        return (self.folder / log).read_text()

    def processes(self, named=""):
        """Return the processes of this home, whoever started them, with a word in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_mine = process.environ().get("POLYPHONY_HOME") == str(self.folder)
                if is_mine and named in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self):
        """Kill every process of this home."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    @contextlib.contextmanager
    def serving(self, *command, log="log.txt"):
        """Run a command beside the test; at the end interrupt it, and kill whatever it leaves."""
        process = self.start(*command, log=log)
        try:
            yield process
        finally:
            self.interrupt(process)
            self.end()

    def interrupt(self, process):
        """End a command as Ctrl-C does, if it still runs."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)


@pytest.fixture(scope="session")
def build_home():
    """Return build(folder, world, command, **configuration): a home whose store is finished, up to the labels or by a command."""

    def build(folder, world, command=("pipelines", "run"), **options):
        config = small_world(folder, world)
        brightness = ScorerConfig(name="brightness", kind="custom", function="held_judge:brightness", revision="1")
        hpd = config.sources[1].model_copy(update={"records_per_shard": 10})
        standard = {"scorers": (*config.scorers[:2], brightness), "sources": (config.sources[0], hpd)}
        home = Home(folder, config.model_copy(update=standard | options))
        home.run(*command)
        return home

    return build


SELECTOR = {"repositoryLocationName": LOCATION, "repositoryName": "__repository__"}
LAUNCH = """
mutation ($parameters: ExecutionParams!) {
  launchPipelineExecution(executionParams: $parameters) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on InvalidSubsetError { message }
    ... on PythonError { message }
  }
}
"""


class Dagster:
    """The webserver's GraphQL over a home, in this process, with the daemon's turns made by hand."""

    def __init__(self, instance, workspace, client):
        self.instance, self.workspace, self.client = instance, workspace, client
        from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

        self._queue = QueuedRunCoordinatorDaemon(interval_seconds=1)

    def ask(self, query, **variables):
        """Return the data of the answer."""
        answer = self.client.post("/graphql", json={"query": query, "variables": variables}).json()
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def launch(self, job="__ASSET_JOB", assets=(), config=None, tags=None):
        """Launch a job, or some assets by their paths; return the run's id."""
        selector = {**SELECTOR, "jobName": job}
        if assets:
            selector["assetSelection"] = [{"path": path} for path in assets]
        parameters = {
            "selector": selector,
            "runConfigData": config or {},
            "mode": "default",
            "executionMetadata": {"tags": [{"key": k, "value": v} for k, v in (tags or {}).items()]},
        }
        answer = self.ask(LAUNCH, parameters=parameters)["launchPipelineExecution"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def status(self, run_id):
        return self.ask("query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", id=run_id)[
            "runOrError"
        ]["status"]

    def dequeue(self):
        """Start the runs that wait, as the daemon does every few seconds."""
        list(self._queue.run_iteration(self.workspace))

    def backfill(self):
        """Turn requested backfills into runs, as the daemon does."""
        from dagster._daemon.backfill import execute_backfill_iteration

        errors = list(execute_backfill_iteration(self.workspace, logging.getLogger("backfill")))
        assert not any(errors), errors

    def finish(self, run_id, seconds=120):
        """Start a launched run, wait for its end and return its status."""

        def ended():
            self.dequeue()
            return self.status(run_id) in FINISHED

        _eventually(ended, seconds, lambda: f"run {run_id} is still {self.status(run_id)}")
        return self.status(run_id)


@pytest.fixture(scope="session")
def dagster_over():
    """Return over(home): a context manager of the GraphQL interface; the code is loaded by a server of its own."""

    @contextlib.contextmanager
    def over(home):
        from dagster._core.workspace.context import WorkspaceProcessContext
        from dagster._core.workspace.load_target import ModuleTarget
        from dagster_webserver.app import create_app_from_workspace_process_context
        from starlette.testclient import TestClient

        target = ModuleTarget(LOCATION, None, str(ROOT), LOCATION)
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            for name, value in home.variables.items():
                patch.setenv(name, value)
            instance = stack.enter_context(dg.DagsterInstance.get())
            stack.callback(home.end)
            workspace = stack.enter_context(WorkspaceProcessContext(instance, target))
            errors = [e.to_string() for e in workspace.create_request_context().code_location_errors()]
            assert not errors, errors[0]
            client = stack.enter_context(TestClient(create_app_from_workspace_process_context(workspace)))
            yield Dagster(instance, workspace, client)

    return over


@pytest.fixture(scope="module")
def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
