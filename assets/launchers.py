"""Training as an external process: streamed, and gone when its parent is gone.

Linux: the child gets SIGTERM when the launching thread's process dies (PR_SET_PDEATHSIG) and its process group is ended
on interrupt. Elsewhere the process group alone. Belongs here: processes. Does not belong here: what they compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

TAIL_LINES = 30
GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # The parent died before the call; nobody will ever send the signal.
            os._exit(1)


def run_module(
    module: str,
    arguments: list[str],
    *,
    log_file: Path,
    on_line: Callable[[str], None],
    on_metrics: Callable[[dict[str, Any]], None],
    environment: dict[str, str] | None = None,
) -> None:
    """Run `python -m module arguments`, passing on its lines as they come; JSON lines go to `on_metrics`.

    Raises:
        dagster.Failure: it exits with another status than 0; the message holds the log's tail.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=functools.partial(_die_with, os.getpid()),
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    try:
        with log_file.open("a") as log:
            for line in process.stdout:
                line = line.rstrip()
                log.write(line + "\n")
                log.flush()
                tail.append(line)
                if line.startswith("{"):
                    with contextlib.suppress(json.JSONDecodeError):
                        on_metrics(json.loads(line))
                elif line:
                    on_line(line)
        status = process.wait()
    except BaseException:
        end_tree(process.pid)
        raise
    if status != 0:
        raise dg.Failure(
            f"`{module} {' '.join(arguments)}` ended with status {status}; log {log_file}; its tail:\n"
            + "\n".join(tail)
        )


def end_tree(pid: int) -> None:
    """End a process and all its descendants: SIGTERM, a grace time, SIGKILL."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
