import os
import signal
import subprocess
import sys
import textwrap
import time

import dagster as dg
import psutil
import pytest

from assets.launchers import run_module


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module which the launcher can start."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name, body):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(body))
        return name

    return write


def launch(name, tmp_path, **more):
    lines, metrics = [], []
    run_module(
        name, [], log_file=tmp_path / "logs" / "log.txt", on_line=lines.append, on_metrics=metrics.append, **more
    )
    return lines, metrics


def test_lines_and_metrics_are_told_apart_and_all_are_logged(module, tmp_path):
    name = module("speaks", """print("hello"); print('{"step": 3}'); print("{not json")""")
    lines, metrics = launch(name, tmp_path)
    assert lines == ["hello"]
    assert metrics == [{"step": 3}]
    assert (tmp_path / "logs" / "log.txt").read_text() == 'hello\n{"step": 3}\n{not json\n'


def test_a_failing_process_is_a_failure_with_the_tail_of_its_log(module, tmp_path):
    name = module("fails", """print("before"); raise SystemExit("no such recipe")""")
    with pytest.raises(dg.Failure, match=r"status 1(.|\n)*before(.|\n)*no such recipe"):
        launch(name, tmp_path)


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


SLEEPER = """
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"pids {os.getpid()} {child.pid}", flush=True)
    time.sleep(600)
"""


def test_an_interrupt_ends_the_process_and_its_children(module, tmp_path):
    name, pids = module("sleeps", SLEEPER), []

    def stop(line):
        pids.extend(int(p) for p in line.split()[1:])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_module(name, [], log_file=tmp_path / "log.txt", on_line=stop, on_metrics=lambda row: None)
    assert len(pids) == 2
    assert wait_until_gone(pids) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_the_process_ends_when_the_launching_process_is_killed(module, tmp_path):
    name = module("sleeps_alone", "import os, time; print(f'pids {os.getpid()}', flush=True); time.sleep(600)")
    code = f"""
        from pathlib import Path
        from assets.launchers import run_module
        run_module({name!r}, [], log_file=Path({str(tmp_path)!r}) / "log.txt", on_line=lambda l: print(l, flush=True),
                   on_metrics=print)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline().split()[1])
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_until_gone([pid]) == []
