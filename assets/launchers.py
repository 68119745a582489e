"""Scoring and training as external processes: streamed, repeated if killed, and gone when their run is gone.

`ProcessClient` is a Pipes client for `python -m MODULE` on this machine. Beside every process that it starts stands a
supervisor, which ends the process and all that it has started when the run is terminated, when the step worker is killed,
and when a Dagster process above that one is killed: the run worker, the code server, the daemon, `dg dev`. Dagster's own
processes outlive each other in all these cases. Linux; elsewhere a process group is ended when the launcher asks or dies.

Belongs here: the step's side of a process. Does not belong here: what it computes, and its tree (`supervisor`).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from dagster_pipes import PipesDefaultMessageWriter

from assets import gpus, supervisor
from pipelines.config import CONFIG_VARIABLE, Config

TAIL_LINES = 30
POLL_SECONDS = 0.1
LINE_BYTES = 8192
"""A longer line is shown as several."""
BURST_LINES, LINES_PER_SECOND = 1000, 5
"""Of what a process prints: each is an event in Dagster's log, which takes some milliseconds and stays there."""
_READ_BYTES = 4_000_000
_KEPT_LINES = 500
KILLED_IS_REPEATED = dg.RetryPolicy(max_retries=1)
"""For assets that start processes, beside `only_kills_are_repeated`: the step whose worker was killed runs once more."""
_MARK = "POLYPHONY_LAUNCH"
"""In the environment of a process and of all that it starts: what is left of it can be found without its supervisor."""
_DAGSTERS = re.compile(r"(dagster|dg)([-_.].*)?")
_DAEMONS = ("dagster-daemon", "dagster._daemon")
_TORCHRUN = re.compile(r"[A-Z]\d{4} .*torch/distributed/elastic/multiprocessing/api\.py:\d+\] ")
_ROOT_CAUSE = "Root Cause (first observed failure):"
_KILLED_RANK = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID \d+")
"""How torchrun, which ends with status 1 itself, tells of a rank that was killed; of those that it ended, too."""
_KILLED_WORKER = "error: a scoring worker died"
"""How `python -m pipelines score` begins to tell of it."""


class DagsterExecutionInterruptedError(dg.DagsterExecutionInterruptedError, dg.DagsterError):
    """An interrupt that no retry policy takes for a failure.

    An asset's retry policy repeats an interrupted step, so that a terminated run in one process would begin it anew;
    Dagster's own errors pass by the policy. The multiprocess executor knows an interrupt by the name of its class.
    """


@contextlib.contextmanager
def only_kills_are_repeated() -> Iterator[None]:
    """Keep a retry policy from repeating what would fail again: it is for killed workers and processes.

    Raises:
        dagster.Failure: what was raised within, not to be repeated.
    """
    try:
        yield
    except (dg.RetryRequested, dg.Failure, DagsterExecutionInterruptedError):
        raise
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt) as error:
        raise DagsterExecutionInterruptedError(str(error) or "interrupted") from error
    except Exception as error:
        raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error


class ProcessClient(dg.PipesClient):
    """Runs modules as processes of this machine for a step."""

    def run(  # type: ignore[override]
        self,
        *,
        context: dg.AssetExecutionContext | dg.OpExecutionContext,
        module: str,
        log_file: Path,
        arguments: Sequence[str] = (),
        config: Config | None = None,
        on_message: Callable[[Any], None] = lambda message: None,
        device: str = "cpu",
        processes: int = 1,
    ) -> dg.PipesClientCompletedInvocation:
        """Run `python -m module arguments` to its end, passing on its lines and messages as they come.

        Args:
            log_file: what it prints is appended here, and shown in the step's log.
            config: what the process finds in $POLYPHONY_CONFIG, written to <home>/launches/<run>/<step>.json.
            on_message: called with each custom Pipes message.
            device: where it computes; GPUs are leased for it (`gpus.lease`) and it sees no others.
            processes: that compute, one GPU each; 0: one per GPU.

        Raises:
            dagster.Failure: it has ended with another status than 0; the message holds its log's tail.
            dagster.RetryRequested: it, or one of its ranks, was killed by somebody else; once per step.
            DagsterExecutionInterruptedError: the step was interrupted, or a Dagster process above it is gone.
        """
        step = step_name(context)
        given = {} if config is None else {CONFIG_VARIABLE: str(_write_config(config, context.run.run_id, step))}
        if not supervisor.IS_LINUX:
            context.log.info(
                f"{sys.platform}: only the process group of {module} is ended with this step, not what leaves the group, "
                f"and not when a Dagster process above this one is killed"
            )
        with (
            gpus.lease(
                device, processes, holder=f"(run {context.run.run_id}, step {step})", progress=context.log.info
            ) as found,
            dg.open_pipes_session(
                _without_results(context), dg.PipesTempFileContextInjector(), reader := _MessageReader()
            ) as session,
        ):
            if found.gpus:
                context.log.info(f"GPUs of this step: {', '.join(found.gpus)}")
            tell = _Throttle(context.log.info, log_file)
            with _Process(
                [sys.executable, "-u", "-m", module, *arguments],
                {**os.environ, **given, **found.environment, **session.get_bootstrap_env_vars()},
                log_file,
                found.descriptors,
            ) as process:
                while True:
                    # Asked first, so that what it said before its end is not missed.
                    has_ended = process.has_ended()
                    for line in process.lines():
                        tell(line)
                    for message in reader.custom():
                        on_message(message)
                    if has_ended:
                        break
                    time.sleep(POLL_SECONDS)
            tell.left_out()
        process.check(f"{module} {' '.join(arguments)}".strip())
        return dg.PipesClientCompletedInvocation(session)


def step_name(context: dg.AssetExecutionContext | dg.OpExecutionContext) -> str:
    """Return the step's key as a file name."""
    op = context.op_execution_context if isinstance(context, dg.AssetExecutionContext) else context
    return re.sub(r"[^\w.-]", "_", op.get_step_execution_context().step.key)


def launch_folder(config: Config, run_id: str) -> Path:
    """Return where the files lie that a run's processes are given."""
    folder = Path(config.home) / "launches" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_config(config: Config, run_id: str, step: str) -> Path:
    file = launch_folder(config, run_id) / f"{step}.json"
    staged = file.with_name(f".{file.name}.staged")
    staged.unlink(missing_ok=True)
    # Options of a filesystem may be credentials.
    staged.touch(mode=0o600)
    staged.write_text(config.model_dump_json(indent=1))
    staged.replace(file)
    return file.resolve()


class _ContextWithoutResults(dg.AssetExecutionContext):
    """A step that may end well without a result of every asset, as one with a limit does; Pipes would forbid it."""

    def set_requires_typed_event_stream(self, *, error_message: str | None = None) -> None:
        """Do nothing."""


def _without_results(
    context: dg.AssetExecutionContext | dg.OpExecutionContext,
) -> dg.AssetExecutionContext | dg.OpExecutionContext:
    is_of_assets = isinstance(context, dg.AssetExecutionContext)
    return _ContextWithoutResults(context.op_execution_context) if is_of_assets else context


class _MessageReader(dg.PipesMessageReader):
    """The messages of a process, read when somebody asks for them.

    Dagster's own reader takes a message for whole that is half written and stops there, and keeps all custom messages.
    """

    def __init__(self) -> None:
        self._unfinished = b""

    @contextlib.contextmanager
    def read_messages(self, handler: Any) -> Iterator[dict[str, Any]]:
        """Give the process a file to write its messages to."""
        self._handler = handler
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "messages"
            path.touch()
            with path.open("rb") as self._file:
                yield {PipesDefaultMessageWriter.FILE_PATH_KEY: str(path)}

    def custom(self) -> Iterator[Any]:
        """Yield the custom messages since the last call; others go to Dagster."""
        while line := self._file.readline():
            self._unfinished += line
            if not line.endswith(b"\n"):
                return
            message, self._unfinished = json.loads(self._unfinished), b""
            if message["method"] == "report_custom_message":
                yield message["params"]["payload"]
            else:
                self._handler.handle_message(message)

    @property
    def expected_writer_count(self) -> int:
        """Return how many processes write: the first rank alone. Dagster warns of its own default."""
        return 1

    def no_messages_debug_text(self) -> str:
        """Return where messages were looked for."""
        return "Looked for messages in a temporary file."


class _Throttle:
    """Passes on lines to the step's log; not more than it can take, and how many were left out."""

    def __init__(self, log: Callable[[str], None], log_file: Path) -> None:
        self._log, self._log_file = log, log_file
        self._allowed, self._at, self._skipped = float(BURST_LINES), time.monotonic(), 0

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        self._allowed = min(BURST_LINES, self._allowed + (now - self._at) * LINES_PER_SECOND)
        self._at = now
        if self._allowed < 1:
            self._skipped += 1
            return
        self._allowed -= 1
        self.left_out()
        self._log(line)

    def left_out(self) -> None:
        """Say how many lines were not passed on since the last one."""
        if self._skipped:
            self._log(f"... {self._skipped} lines are in {self._log_file} alone")
        self._skipped = 0


class _Process:
    """A supervised process and its log."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], log_file: Path, keep: Sequence[int]
    ) -> None:
        self._log_file, self._mark = log_file, uuid.uuid4().hex
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._unfinished = b""
        self._ours, theirs = socket.socketpair()
        try:
            with theirs, log_file.open("ab") as log:
                self._log = log_file.open("rb")
                self._log.seek(0, os.SEEK_END)
                options = {"socket": theirs.fileno(), "watch": watched(), "keep": list(keep)}
                self._supervisor = subprocess.Popen(
                    [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(options), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno(), *keep],
                    start_new_session=True,
                    env={**environment, _MARK: self._mark},
                )
        except BaseException:
            # An interrupt may come when the process runs already: this ends it.
            self._ours.close()
            raise

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """End everything that still runs."""
        try:
            if self._supervisor.poll() is None:
                self._supervisor.terminate()
                self._supervisor.wait(3 * supervisor.GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        finally:
            self._end = self._last_words()
            if self._end is None:
                # Somebody has killed the supervisor, or asks a second time for an end.
                self._kill_marked()
            self._ours.close()
            self._log.close()

    def has_ended(self) -> bool:
        """Return whether it has, and all that it has started with it."""
        return self._supervisor.poll() is not None

    def lines(self) -> Iterator[str]:
        """Yield what was printed since the last call (some of it, where that is much), but for empty lines."""
        is_over, read = self.has_ended(), 0
        while is_over or read < _READ_BYTES:
            piece = self._log.readline(LINE_BYTES - len(self._unfinished))
            read += len(piece)
            raw = self._unfinished + piece
            if not raw or not (is_over or raw.endswith(b"\n") or len(raw) == LINE_BYTES):
                self._unfinished = raw
                return
            self._unfinished = b""
            # Of a progress bar, what a terminal would show.
            line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
            if line:
                self._last.append(line)
                yield line

    def check(self, what: str) -> None:
        """Raise unless it has ended well; see `ProcessClient.run`."""
        status = self._supervisor.returncode
        if self._end is not None and self._end["why"] is not None:
            raise DagsterExecutionInterruptedError(f"`{what}` was ended: {self._end['why']}; log {self._log_file}")
        if status == 0:
            return
        tail, cause = _without_torchrun(list(self._last))
        killed = [f"by {signal.Signals(-status).name}"] if status < 0 else _killed_parts(tail, cause)
        how = f"was killed {killed[0]}" if killed else f"ended with status {status}"
        failure = dg.Failure(
            f"`{what}` {how}; log {self._log_file}; its tail:\n" + "\n".join([*tail[-TAIL_LINES:], *cause]),
            metadata={"log": dg.MetadataValue.path(str(self._log_file.resolve())), "status": status},
            allow_retries=False,
        )
        if killed:
            raise dg.RetryRequested(max_retries=KILLED_IS_REPEATED.max_retries) from failure
        raise failure

    def _last_words(self) -> dict[str, Any] | None:
        """Return what the supervisor said at its end, None if it could not say anything."""
        self._ours.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            said = self._ours.recv(65536)
            return json.loads(said) if said else None
        return None

    def _kill_marked(self) -> None:
        """Kill what carries this process's mark, until a look finds nothing that ends of it."""
        while True:
            found = [p for p in psutil.process_iter() if _carries(p, self._mark)]
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not psutil.wait_procs(found, timeout=supervisor.GRACE_SECONDS)[0]:
                return


def _without_torchrun(lines: list[str]) -> tuple[list[str], list[str]]:
    """Return what was printed before torchrun's own report, and what that says of the rank that failed first."""
    began = next((i for i, line in enumerate(lines) if _TORCHRUN.match(line)), len(lines))
    cause = next((i for i, line in enumerate(lines) if _ROOT_CAUSE in line), len(lines))
    return lines[: min(began, cause)], lines[cause:]


def _killed_parts(tail: list[str], cause: list[str]) -> list[str]:
    """Return by what parts of a process were killed that then ended by itself."""
    ranks = [f"by {signal.Signals(int(n)).name}" for n in _KILLED_RANK.findall("\n".join(cause))]
    return ranks + ["in part" for line in tail if line.startswith(_KILLED_WORKER)]


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def watched() -> list[tuple[int, int]]:
    """Return (id, start) of the processes without which what is started here is an orphan; on Linux.

    This one; its ancestors up to the highest one that is Dagster's by its command line (a code server, `dagster-daemon`,
    `dg dev`), or that started a worker of multiprocessing; the daemons that these have started. Not watched: shells,
    service managers and test runners above them.
    """
    if not supervisor.IS_LINUX:
        return []
    chain = [psutil.Process(), *psutil.Process().parents()]
    last = 0
    for i, process in enumerate(chain[1:], 1):
        below = chain[i - 1]
        if _is_dagsters(process) or _is_worker(below) or (i == 1 and multiprocessing.parent_process() is not None):
            last = i
    needed = [p for p in chain[: last + 1] if p.pid != 1]
    for process in needed[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            needed += [p for p in process.children() if _is_daemon(p) and p not in needed]
    starts = [(p.pid, found.started) for p in needed if (found := supervisor.stat(p.pid)) is not None]
    return list(dict.fromkeys(starts))


def _words(process: psutil.Process) -> list[str]:
    """Return the interpreter, its options and the program's name; code after -c may be long."""
    try:
        return [Path(word).name for word in process.cmdline()[:4]]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def _is_dagsters(process: psutil.Process) -> bool:
    return any(_DAGSTERS.fullmatch(word) for word in _words(process))


def _is_worker(process: psutil.Process) -> bool:
    return any("multiprocessing" in word for word in _words(process))


def _is_daemon(process: psutil.Process) -> bool:
    return any(word in _DAEMONS for word in _words(process))
