"""The supervisor, started as the launcher starts it, over real processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from assets import supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no subreaper and no /proc")

SLEEP = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


class Started:
    """A supervised command, and our end of its socket."""

    def __init__(self, code, watch=(), before=None):
        self.ours, theirs = socket.socketpair()
        options = {"socket": theirs.fileno(), "watch": list(watch), "keep": []}
        command = [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(options)]
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            preexec_fn=before,
        )
        theirs.close()

    def line(self):
        return self.process.stdout.readline().strip()

    def end(self):
        """Return (status, what it said on its socket) when it has ended."""
        status = self.process.wait(timeout=60)
        said = self.ours.recv(4096)
        return status, json.loads(said) if said else None


@pytest.fixture
def start():
    """Return a function that starts a supervised command; what is left of it afterwards is killed."""
    started = []

    def begin(*arguments, **options):
        started.append(Started(*arguments, **options))
        return started[-1]

    yield begin
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(one.process.pid)
            for left in [*process.children(recursive=True), process]:
                left.kill()
        one.process.communicate()
        one.ours.close()


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


def test_it_ends_as_the_command_ends(start):
    assert start("raise SystemExit(7)").end() == (7, {"why": None})
    assert start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").end() == (-9, {"why": None})
    assert start("import os, signal; os.kill(os.getpid(), signal.SIGABRT)").end() == (-6, {"why": None})


def test_a_command_that_is_not_there_is_named():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = json.dumps({"socket": theirs.fileno(), "watch": [], "keep": []})
        command = [sys.executable, "-I", "-S", supervisor.__file__, options, "no-such-command"]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert done.stderr == "supervisor: no-such-command: No such file or directory\n"


def test_sigterm_ends_the_command_and_says_why(start):
    started = start(f"import os; print(os.getpid(), flush=True); {SLEEP}")
    pid = int(started.line())
    started.process.terminate()
    status, said = started.end()
    assert (status, said) == (-15, {"why": "SIGTERM received"})
    assert not alive(pid)


def test_it_ends_when_the_launcher_is_gone_though_the_command_ignores_sigterm(start):
    started = start(DEAF)
    assert started.line() == "deaf"
    pids = [started.process.pid, *supervisor.descendants(started.process.pid)]
    assert len(pids) == 2
    started.ours.close()
    assert wait_until_gone(pids) == []


# Ends at once; what it has started, in a session of its own and deaf to SIGTERM, has no parent any more.
MIDDLE = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {DEAF!r}], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


def test_what_left_its_parent_and_its_session_is_ended_too(start):
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {MIDDLE!r}]); print('alone', flush=True); {SLEEP}"
    started = start(code)
    pid = int(started.line())
    assert started.line() == "alone"
    assert psutil.Process(pid).ppid() == started.process.pid
    started.ours.close()
    assert wait_until_gone([pid, started.process.pid]) == []


def test_what_a_command_leaves_behind_at_its_own_end_is_ended(start):
    started = start(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {MIDDLE!r}])")
    pid = int(started.line())
    status, said = started.end()
    assert (status, said) == (0, {"why": None})
    assert not alive(pid)


def test_it_ends_when_a_watched_process_is_gone_be_it_unreaped(start):
    watched = subprocess.Popen([sys.executable, "-c", SLEEP])
    started = start(f"print('up', flush=True); {SLEEP}", watch=[(watched.pid, supervisor.stat(watched.pid).started)])
    assert started.line() == "up"
    assert started.process.poll() is None
    watched.kill()
    status, said = started.end()
    assert psutil.Process(watched.pid).status() == psutil.STATUS_ZOMBIE
    assert (status, said) == (-15, {"why": f"process {watched.pid}, which started this, is gone"})
    watched.wait()


def test_a_watched_id_that_another_process_has_by_now_counts_as_gone(start):
    me = os.getpid()
    assert start(SLEEP, watch=[(me, supervisor.stat(me).started - 1)]).end()[0] == -15


def ignore_and_block():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})


def test_signals_that_were_ignored_or_blocked_at_its_start_work_in_it_and_in_the_command(start):
    code = """
        import signal, time
        ignored = [n.name for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]
        print(ignored, sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), flush=True)
        time.sleep(600)
    """
    started = start(code, before=ignore_and_block)
    assert started.line() == "[] []"
    started.process.terminate()
    # Of SIGTERM, not of the SIGKILL that follows where that is ignored.
    assert started.end() == (-15, {"why": "SIGTERM received"})


def test_the_command_does_not_outlive_a_killed_supervisor(start):
    started = start(f"import os; print(os.getpid(), flush=True); {SLEEP}")
    pid = int(started.line())
    started.process.kill()
    assert wait_until_gone([pid]) == []


# Forks and exits for ever, so that no look at the processes sees one that still runs when the signal comes.
RABBIT = """
import os, sys, time
until = time.monotonic() + 120
while time.monotonic() < until:
    if os.fork():
        os._exit(0)
    time.sleep(0.0005)
    with open(sys.argv[1], "w") as file:
        file.write("here")
"""


def test_what_forks_and_exits_faster_than_one_can_look_is_ended_too(start, tmp_path):
    seen = tmp_path / "seen"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {RABBIT!r}, {str(seen)!r}]); {SLEEP}"
    started = start(code)
    for _ in range(1000):
        if seen.exists():
            break
        time.sleep(0.05)
    started.process.terminate()
    assert started.end() == (-15, {"why": "SIGTERM received"})
    seen.unlink()
    time.sleep(0.5)
    assert not seen.exists()
