"""The launcher in real runs: what a step shows of its process, and what is left of it after every kind of end."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest

from assets.launchers import (
    BURST_LINES,
    KILLED_IS_REPEATED,
    LINE_BYTES,
    TAIL_LINES,
    ProcessClient,
    only_kills_are_repeated,
    watched,
)
from pipelines import config as configuration

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process group alone is ended")


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids, seconds=10):
    # Counted, not measured: a machine that stands still for a while gives its processes no time either.
    for _ in range(int(seconds / 0.05)):
        if not any(alive(p) for p in pids):
            break
        time.sleep(0.05)
    return [p for p in pids if alive(p)]


def wait_for(found, what, seconds=90):
    """Return what `found` returns, once that is true."""
    for _ in range(int(seconds / 0.05)):
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} never came")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module which the launcher can start."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    def write(name, body):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(body))
        return name

    return write


# --- in this process: what a step shows of its process -----------------------------------------------------------------


def materialize(tmp_path, **options):
    """Run a step that starts a module; return (result, the step's log lines, messages)."""
    messages, lines = [], []

    @dg.logger
    def collecting(init_context):
        import logging

        class Collect(logging.Handler):
            def emit(self, record):
                lines.append(record.dagster_meta["orig_message"])

        logger = logging.Logger("collecting")
        logger.addHandler(Collect())
        return logger

    @dg.asset(retry_policy=KILLED_IS_REPEATED)
    def launched(context) -> dg.MaterializeResult:
        with only_kills_are_repeated():
            ProcessClient().run(
                context=context, log_file=tmp_path / "logs" / "log.txt", on_message=messages.append, **options
            )
        return dg.MaterializeResult()

    definitions = dg.Definitions(assets=[launched], loggers={"console": collecting})
    result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        raise_on_error=False, run_config={"loggers": {"console": {}}}
    )
    return result, lines, messages


def failure_of(result):
    return next(e for e in result.all_events if e.is_step_failure).event_specific_data


def test_lines_are_logged_and_messages_are_passed_on(module, tmp_path):
    body = """
        import sys
        from pipelines import reporting
        print("hello"); print("from stderr", file=sys.stderr)
        with reporting.opened() as tell:
            for step in range(200):
                tell({"step": step})
        print("no newline at the end", end="")
    """
    result, lines, messages = materialize(tmp_path, module=module("speaks", body))
    assert result.success, failure_of(result)
    assert [line for line in lines if line in ("hello", "from stderr", "no newline at the end")] == [
        "hello",
        "from stderr",
        "no newline at the end",
    ]
    assert messages == [{"step": step} for step in range(200)]
    assert (tmp_path / "logs" / "log.txt").read_text() == "hello\nfrom stderr\nno newline at the end"


def test_a_failing_process_is_a_failure_with_the_tail_of_its_log_and_is_not_repeated(module, tmp_path):
    body = """
        print(*range(100), sep="\\n"); raise SystemExit("no such recipe")
    """
    result, _, _ = materialize(tmp_path, module=module("fails", body), arguments=["--recipe", "x"])
    text = failure_of(result).error.message
    log = tmp_path / "logs" / "log.txt"
    assert f"`fails --recipe x` ended with status 1; log {log}; its tail:\n71\n72\n" in text
    assert text.rstrip().endswith("99\nno such recipe")
    assert failure_of(result).user_failure_data.metadata["log"].value == str(log)
    assert log.read_text().count("no such recipe") == 1


def test_a_killed_process_is_repeated_once_by_itself(module, tmp_path):
    body = f"""
        import os, signal
        from pathlib import Path
        attempts = Path({str(tmp_path)!r}) / "attempts"
        with attempts.open("a") as file:
            print("one", file=file)
        if attempts.read_text().count("one") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        print("second attempt")
    """
    result, lines, _ = materialize(tmp_path, module=module("dies_once", body))
    assert result.success
    assert "second attempt" in lines


def test_a_process_that_is_killed_twice_is_a_failure_that_says_so(module, tmp_path):
    body = """
        import os, signal
        print("again", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result, _, _ = materialize(tmp_path, module=module("dies", body))
    assert (tmp_path / "logs" / "log.txt").read_text() == "again\nagain\n"
    assert "`dies` was killed by SIGKILL" in failure_of(result).user_failure_data.description


def test_an_error_of_the_step_itself_is_not_repeated(tmp_path):
    attempts = []

    @dg.asset(retry_policy=KILLED_IS_REPEATED)
    def broken() -> dg.MaterializeResult:
        attempts.append(1)
        with only_kills_are_repeated():
            raise ValueError("no such table")

    result = dg.materialize([broken], raise_on_error=False)
    assert len(attempts) == 1
    assert "ValueError: no such table" in failure_of(result).error.message


def test_the_process_reads_the_configuration_that_the_step_has(module, tmp_path):
    body = """
        from pipelines import config, reporting
        with reporting.opened() as tell:
            tell(config.load().model_dump(mode="json"))
    """
    config = configuration.small_world(tmp_path / "home")
    result, _, messages = materialize(tmp_path, module=module("reads", body), config=config)
    assert configuration.Config.model_validate(messages[0]) == config
    file = tmp_path / "home" / "launches" / result.run_id / "launched.json"
    assert configuration.load(file) == config
    assert list(file.parent.iterdir()) == [file]
    # Options of filesystems may be credentials.
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_message_is_read_when_all_of_it_is_written(module, tmp_path):
    body = """
        import json, time
        from dagster_pipes import PipesFileMessageWriterChannel
        from pipelines import reporting

        def write_in_two(self, message):
            text = json.dumps(message) + "\\n"
            for half in (text[:20], text[20:]):
                with open(self._path, "a") as file:
                    file.write(half)
                time.sleep(0.3)

        PipesFileMessageWriterChannel.write_message = write_in_two
        with reporting.opened() as tell:
            tell({"step": 1})
            tell({"step": 2})
    """
    result, _, messages = materialize(tmp_path, module=module("halves", body))
    assert result.success
    assert messages == [{"step": 1}, {"step": 2}]


def test_a_line_without_an_end_is_shown_in_pieces_and_a_progress_bar_as_a_terminal_shows_it(module, tmp_path):
    body = f"""
        import sys
        print("1 of 2\\r2 of 2")
        sys.stdout.buffer.write(b"\\xff" + b"x" * (100 * {LINE_BYTES} - 1))
        raise SystemExit(3)
    """
    result, lines, _ = materialize(tmp_path, module=module("endless", body))
    assert "2 of 2" in lines
    assert {len(line) for line in lines if line.endswith("x")} == {LINE_BYTES}
    assert len(failure_of(result).user_failure_data.description) < (TAIL_LINES + 1) * LINE_BYTES


def test_of_very_many_lines_some_are_logged_and_the_others_counted(module, tmp_path):
    body = f"""
        for i in range(20 * {BURST_LINES}):
            print("line", i)
        raise SystemExit("the end")
    """
    result, lines, _ = materialize(tmp_path, module=module("many_lines", body))
    shown = [line for line in lines if line.startswith("line ")]
    left_out = [int(line.split()[1]) for line in lines if line.startswith("... ")]
    assert shown[:BURST_LINES] == [f"line {i}" for i in range(BURST_LINES)]
    assert sum(left_out) + len(shown) + ("the end" in lines) == 20 * BURST_LINES + 1
    assert left_out
    assert "the end" in failure_of(result).error.message


FAILING_RANK = """
import os, sys, time
if "RANK" not in os.environ:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "failing_rank"]
    os.execve(sys.executable, command, dict(os.environ))
if os.environ["RANK"] == "0":
    print("attempt", flush=True)
    time.sleep(3)
    raise ValueError("no such pair")
time.sleep(600)
"""


def test_a_failing_rank_is_a_failure_with_its_own_words_and_is_not_repeated_though_others_were_ended(module, tmp_path):
    result, lines, _ = materialize(tmp_path, module=module("failing_rank", FAILING_RANK))
    assert any("Signal 15 (SIGTERM) received by PID" in line for line in lines)
    assert lines.count("attempt") == 1
    text = failure_of(result).error.message
    assert "`failing_rank` ended with status 1" in text
    assert "ValueError: no such pair" in text
    assert "Root Cause" in text


def test_a_step_may_end_well_without_a_result_though_it_started_a_process(module, tmp_path):
    name = module("quiet", "pass")

    @dg.multi_asset(specs=[dg.AssetSpec("limited")], can_subset=True)
    def limited(context):
        ProcessClient().run(context=context, module=name, log_file=tmp_path / "log.txt")
        yield from ()

    assert dg.materialize([limited], raise_on_error=False).success


def test_a_process_that_ends_leaves_nothing_running(module, tmp_path):
    body = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    """
    result, _, _ = materialize(tmp_path, module=module("leaves", body))
    assert result.success
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_test_runner_is_not_watched_but_this_process_is():
    assert [pid for pid, _ in watched()] == ([os.getpid()] if sys.platform == "linux" else [])


# --- in runs of their own: what is left after an end -------------------------------------------------------------------

# It sleeps, with a child in a session of its own, both deaf to SIGTERM where the module's name says so; the second attempt
# ends well.
SLEEPER = """
import os, signal, subprocess, sys, time
from pathlib import Path
here = Path(__file__).parent
if "deaf" in __file__:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
attempt = len(list(here.glob("attempt-*"))) + 1
# A signal that is ignored is ignored by children.
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(here / "staged").write_text(f"{os.getpid()} {child.pid}")
(here / "staged").rename(here / f"attempt-{attempt}")
time.sleep(600 if attempt == 1 else 0)
"""
RUN = """
import os, sys
from pathlib import Path
import dagster as dg
from assets.launchers import KILLED_IS_REPEATED, ProcessClient, only_kills_are_repeated
HERE = Path(__file__).parent

@dg.asset(retry_policy=KILLED_IS_REPEATED)
def launched(context) -> dg.MaterializeResult:
    with only_kills_are_repeated():
        ProcessClient().run(context=context, module=os.environ["MODULE"], log_file=HERE / "log.txt")
    return dg.MaterializeResult()

def job():
    executor = getattr(dg, os.environ["EXECUTOR"])
    found = dg.define_asset_job("launch", selection="*", executor_def=executor)
    return dg.Definitions(assets=[launched], jobs=[found]).resolve_job_def("launch")

if __name__ == "__main__":
    instance = dg.DagsterInstance.local_temp(str(HERE / "dagster"))
    result = dg.execute_job(dg.reconstructable(job), instance=instance, raise_on_error=False)
    sys.exit(0 if result.success else 1)
"""


class Run:
    """A run in a process of its own, and the processes below it."""

    def __init__(self, folder, executor, module, through=()):
        self.folder = folder
        (folder / "run_it.py").write_text(RUN)
        (folder / "dagster").mkdir(exist_ok=True)
        environment = {**os.environ, "EXECUTOR": executor, "MODULE": module, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
        self.output = (folder / "output").open("w")
        command = [*through, sys.executable, str(folder / "run_it.py")]
        self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=self.output, stderr=self.output)

    def pids(self, attempt=1):
        """Return (launcher, supervisor, what the module said: itself and its child) once the attempt has begun."""
        file = self.folder / f"attempt-{attempt}"
        wait_for(lambda: file.exists() or self.process.poll() is not None, file.name)
        assert file.exists(), (self.folder / "output").read_text()[-3000:]
        found = [int(pid) for pid in file.read_text().split()]
        supervisor = psutil.Process(found[0]).parent()
        return supervisor.ppid(), supervisor.pid, *found

    def close(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [
                psutil.Process(self.process.pid),
                *psutil.Process(self.process.pid).children(recursive=True),
            ]:
                process.kill()
        self.process.wait()
        self.output.close()

    @property
    def instance(self):
        return dg.DagsterInstance.local_temp(str(self.folder / "dagster"))

    def status(self):
        with self.instance as instance:
            return instance.get_runs()[0].status.value


@pytest.fixture
def run(tmp_path):
    """Return a function that starts a run of the sleeper."""
    for name in ("sleeper", "deaf_sleeper"):
        (tmp_path / f"{name}.py").write_text(SLEEPER)
    runs = []

    def start(executor, module="sleeper", through=()):
        runs.append(Run(tmp_path, executor, module, through))
        return runs[-1]

    yield start
    for one in runs:
        one.close()


@linux
def test_a_killed_step_worker_leaves_nothing_and_its_step_is_repeated(run):
    started = run("multiprocess_executor")
    worker, *below = started.pids()
    assert worker != started.process.pid
    os.kill(worker, signal.SIGKILL)
    assert wait_until_gone(below) == []
    assert started.process.wait(timeout=120) == 0
    assert sorted(p.name for p in started.folder.glob("attempt-*")) == ["attempt-1", "attempt-2"]


@linux
@pytest.mark.parametrize(
    ("executor", "sleeper"), [("in_process_executor", "deaf_sleeper"), ("multiprocess_executor", "sleeper")]
)
def test_a_killed_run_worker_leaves_nothing_though_its_step_worker_may_live_on(run, executor, sleeper):
    started = run(executor, sleeper)
    worker, *below = started.pids()
    os.kill(started.process.pid, signal.SIGKILL)
    assert wait_until_gone(below) == []
    # Its step is interrupted, not stuck and not begun again.
    assert wait_until_gone([worker], seconds=60) == [] if worker != started.process.pid else True
    assert len(list(started.folder.glob("attempt-*"))) == 1


@linux
@pytest.mark.parametrize(
    ("executor", "stop"), [("in_process_executor", signal.SIGTERM), ("multiprocess_executor", signal.SIGINT)]
)
def test_a_terminated_run_leaves_nothing_is_canceled_and_begins_nothing_anew(run, executor, stop):
    started = run(executor)
    _, *below = started.pids()
    with started.instance as instance:
        instance.report_run_canceling(instance.get_runs()[0])
    started.process.send_signal(stop)
    assert wait_until_gone(below) == []
    started.process.wait(timeout=60)
    assert started.status() == "CANCELED"
    assert len(list(started.folder.glob("attempt-*"))) == 1


# What starts the run and goes on, as a daemon's code server does; by its name it is Dagster's.
STARTER = """
import subprocess, sys
subprocess.run(sys.argv[1:])
"""


@linux
def test_a_killed_daemon_above_the_run_leaves_nothing(run, tmp_path):
    daemon, server = tmp_path / "dagster-daemon", tmp_path / "dagster-server.py"
    for file in (daemon, server):
        file.write_text(STARTER)
    started = run("in_process_executor", through=[sys.executable, str(daemon), sys.executable, str(server)])
    launcher, *below = started.pids()
    started.process.kill()
    # Not as a zombie alone: its parent, this test, has not waited for it.
    assert wait_until_gone(below) == []
    # The run has ended as one that is to be retried: neither as a failed step's, nor as somebody's wish.
    assert wait_until_gone([launcher], seconds=60) == []
    assert started.status() == "FAILURE"
    with started.instance as instance:
        assert instance.get_runs()[0].tags["dagster/failure_reason"] == "UNEXPECTED_TERMINATION"


@linux
def test_a_killed_supervisor_leaves_nothing_and_the_step_is_repeated(run):
    started = run("in_process_executor", "deaf_sleeper")
    _, supervisor, *below = started.pids()
    os.kill(supervisor, signal.SIGKILL)
    assert wait_until_gone(below) == []
    assert started.process.wait(timeout=60) == 0


# Starts torchrun as `trainers.train` does; every rank says who it is.
RANKS = """
import os, sys, time
from pathlib import Path
here = Path(__file__).parent
if "RANK" not in os.environ:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ranks"]
    os.execve(sys.executable, command, {**os.environ, "ACCELERATE_USE_CPU": "true"})
import torch.distributed as dist
from pipelines import reporting
with reporting.opened() as tell:
    tell({"rank": os.environ["RANK"]})
    dist.init_process_group("gloo")
    everyone = [None, None]
    dist.all_gather_object(everyone, os.getpid())
    if dist.get_rank() == 0:
        attempt = len(list(here.glob("attempt-*"))) + 1
        (here / "staged").write_text(f"{os.getppid()} {everyone[0]} {everyone[1]}")
        (here / "staged").rename(here / f"attempt-{attempt}")
    time.sleep(600)
"""


@linux
def test_a_killed_rank_is_repeated_and_a_killed_launcher_leaves_no_rank(run, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    started = run("in_process_executor", "ranks")
    _, _, torchrun, first, second = started.pids()
    assert {psutil.Process(p).ppid() for p in (first, second)} == {torchrun}
    os.kill(second, signal.SIGKILL)
    assert wait_until_gone([torchrun, first], seconds=60) == []
    launcher, supervisor, torchrun, *ranks = started.pids(attempt=2)
    assert launcher == started.process.pid
    os.kill(launcher, signal.SIGKILL)
    assert wait_until_gone([supervisor, torchrun, *ranks]) == []
