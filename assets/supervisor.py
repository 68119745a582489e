"""Starts one command and leaves nothing of it behind: `python -I -S assets/supervisor.py OPTIONS COMMAND ...`.

The launcher starts this file and this file the command, because only a process that lives beside the launcher can clean
up when the launcher is killed. It ends the command and everything that came of it (SIGTERM, GRACE_SECONDS, SIGKILL) when
the command itself has ended, when it gets SIGTERM, when the launcher is gone, or when one of the processes is gone that
the launcher has told it to watch. Linux: whatever loses its parent below it becomes its child (PR_SET_CHILD_SUBREAPER), in
whatever session or group; elsewhere it ends the command's process group alone, and watches the launcher alone.

Belongs here: the life of one process tree, with the standard library alone, so that it starts in milliseconds.
Does not belong here: what is started and why (`launchers`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

GRACE_SECONDS = 5.0
POLL_SECONDS = 0.2
IS_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stat(NamedTuple):
    """What /proc says of a process; `started` (clock ticks since the boot) tells it from others that had its id."""

    state: str
    parent: int
    group: int
    started: int

    @property
    def is_alive(self) -> bool:
        """Return whether it runs: a zombie does not."""
        return self.state not in "ZX"


def stat(pid: int) -> Stat | None:
    """Return what Linux knows of a process, None if there is none of that id, or none that we may see."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name, in brackets, may hold anything, brackets too.
    fields = text[text.rindex(b")") + 2 :].split()
    return Stat(fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[19]))


def is_gone(pid: int, started: int) -> bool:
    """Return whether a process has ended, be its id another's by now."""
    found = stat(pid)
    return found is None or not found.is_alive or found.started != started


def descendants(pid: int) -> dict[int, Stat]:
    """Return the living processes below one, by their ids."""
    below: dict[int, dict[int, Stat]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (found := stat(int(name))) is not None and found.is_alive:
            below.setdefault(found.parent, {})[int(name)] = found
    found_all: dict[int, Stat] = {}
    todo = [pid]
    while todo:
        children = below.get(todo.pop(), {})
        found_all |= children
        todo += children
    return found_all


def main(arguments: Sequence[str]) -> int:
    """Run the command to its end, whatever ends it; die of its signal, or return its status.

    Args:
        arguments: JSON (`socket`: descriptor whose other end only the launcher holds; `watch`: [pid, started] of
            processes whose end ends the command; `keep`: descriptors that it inherits), then the command.
    """
    options, command = json.loads(arguments[0]), arguments[1:]
    launcher = socket.socket(fileno=options["socket"])
    launcher.set_inheritable(False)
    told = _listen()
    if IS_LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = _start(command, options["keep"])
    statuses: dict[int, int] = {}
    why = _wait(child, launcher, told, options["watch"], statuses)
    if why is not None:
        with contextlib.suppress(OSError):
            print(f"supervisor: {why}: ending the process and all that it has started", file=sys.stderr, flush=True)
    _end_all(child, statuses)
    with contextlib.suppress(OSError):
        launcher.sendall(json.dumps({"why": why}).encode())
    return _leave(statuses.get(child))


def _listen() -> list[int]:
    """Collect the signals that ask for an end, whatever was ignored or blocked where this was started."""
    told: list[int] = []
    for number in _STOPPING:
        signal.signal(number, lambda got, frame: told.append(got))
    # With a handler of its own it interrupts the wait, by the descriptor that _wait polls.
    signal.signal(signal.SIGCHLD, lambda got, frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return told


def _start(command: Sequence[str], keep: Sequence[int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        # An ignored signal stays ignored in all children. Dagster gives SIGTERM the handler of SIGINT, and a shell that
        # starts something in the background ignores SIGINT: neither would end the command.
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if signal.getsignal(number) != signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
        if IS_LINUX:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)
        for descriptor in keep:
            os.set_inheritable(descriptor, True)
        os.execvp(command[0], list(command))
    except OSError as error:
        print(f"supervisor: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def _wait(
    child: int, launcher: socket.socket, told: list[int], watch: Sequence[Sequence[int]], statuses: dict[int, int]
) -> str | None:
    """Return why the command is to be ended, None if it has ended by itself."""
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(launcher, select.POLLIN | select.POLLHUP)
    while True:
        _reap(statuses)
        if child in statuses:
            return None
        if told:
            return f"{signal.Signals(told[0]).name} received"
        for pid, started in watch:
            if is_gone(pid, started):
                return f"process {pid}, which started this, is gone"
        ready = {descriptor for descriptor, _ in poll.poll(POLL_SECONDS * 1000)}
        if launcher.fileno() in ready:
            return "the launcher is gone"
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)


def _reap(statuses: dict[int, int]) -> bool:
    """Take the statuses of children that have ended; return whether there is no child any more."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False
        # Another may get the id of one that has ended.
        statuses.setdefault(pid, status)


def _left(child: int, number: int) -> list[int]:
    """Return what is to be sent a signal, as `os.kill` takes it: processes, and for SIGKILL their groups; or a group."""
    if IS_LINUX:
        found = descendants(os.getpid())
        if number != signal.SIGKILL:
            return list(found)
        # A group dies at once: what forks and exits faster than we look has none of the ids that we saw, but its group.
        groups = {s.group for s in found.values() if s.group > 1} - {os.getpgrp()}
        return [*found, *(-group for group in groups)]
    try:
        os.kill(-child, 0)
    except (ProcessLookupError, PermissionError):
        return []
    return [-child]


def _end_all(child: int, statuses: dict[int, int]) -> None:
    """SIGTERM to each once, then SIGKILL until nothing is left; each for GRACE_SECONDS at most."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until, sent = time.monotonic() + GRACE_SECONDS, set[int]()
        while True:
            is_childless = _reap(statuses)
            left = _left(child, number)
            # On Linux whatever is below us has an ancestor that is our child; a look alone may miss what forks meanwhile.
            if not left and (is_childless or not IS_LINUX):
                return
            for pid in left:
                if pid not in sent or number == signal.SIGKILL:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, number)
                    sent.add(pid)
            if time.monotonic() > until:
                break
            time.sleep(0.02)


def _leave(status: int | None) -> int:
    code: Any = 1 if status is None else os.waitstatus_to_exitcode(status)
    if code >= 0:
        return int(code)
    import resource

    # The command has left its own core, if any.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    return 128 - int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
