"""Leases over real locks between real processes; the names of GPUs are given, so that no GPU is needed."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from assets import gpus
from assets.resources import Polyphony
from pipelines.config import ConfigError

ROOT = Path(__file__).parents[2]
GPUS = ["GPU-a", "GPU-b"]


@pytest.fixture
def lease(tmp_path):
    """Return a function that leases GPUs of this test's machine."""

    def take(device="auto", count=1, names=GPUS, **options):
        return gpus.lease(device, count, gpus=names, folder=tmp_path / "leases", **options)

    return take


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from assets import gpus
device, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
with gpus.lease(device, count, gpus=["GPU-a", "GPU-b"], folder=folder, holder="(run 42)", progress=print) as found:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=found.descriptors)
    print("has", child.pid, *found.gpus, flush=True)
    time.sleep(600)
"""


class Holder:
    """Another process that leases GPUs, and a child of it that inherits the lease."""

    def __init__(self, folder, device="auto", count=1):
        command = [sys.executable, "-u", "-c", textwrap.dedent(HOLDER), device, str(count), str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.child = 0

    def taken(self):
        _, child, *names = self.process.stdout.readline().split()
        self.child = int(child)
        return names


@pytest.fixture
def hold(tmp_path):
    holders = []

    def start(*arguments):
        holders.append(Holder(tmp_path / "leases", *arguments))
        return holders[-1]

    yield start
    for holder in holders:
        holder.process.kill()
        if holder.child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder.child, signal.SIGKILL)
        # It reads to the end of what both may write to.
        holder.process.communicate()


def test_each_lease_gets_a_gpu_of_its_own_and_its_child_sees_that_one_alone(lease):
    with lease() as one, lease() as two:
        assert (one.gpus, two.gpus) == (("GPU-a",), ("GPU-b",))
        assert (one.device, two.device) == ("cuda:0", "cuda:1")
        assert two.environment == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    with lease(count=0) as both:
        assert both.gpus == ("GPU-a", "GPU-b")
        assert both.device == "cuda"
        assert both.environment == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}


def test_a_cpu_and_a_machine_without_gpus_need_no_lease(lease):
    with lease("cpu") as found:
        assert found == gpus.Lease("cpu")
    with lease("auto", names=[]) as found:
        assert found == gpus.Lease("auto")


def test_one_gpu_is_taken_by_number_and_the_number_stays_right_in_a_child(lease):
    with lease("cuda:1") as found:
        assert (found.gpus, found.device, found.environment) == (("GPU-b",), "cuda:1", {})
        with lease() as other:
            assert other.gpus == ("GPU-a",)
    with pytest.raises(ConfigError, match=r"cuda:2.*2 GPUs"), lease("cuda:2"):
        pass


def test_more_than_there_are_is_all_of_them(lease):
    with lease(count=5) as found:
        assert found.gpus == ("GPU-a", "GPU-b")


def test_who_waits_is_told_for_whom_and_gets_what_a_killed_process_and_its_child_had(lease, hold):
    holder = hold("cuda:0")
    assert holder.taken() == ["GPU-a"]
    told = []

    def kill_all_when_told(message):
        told.append(message)
        holder.process.kill()
        os.kill(holder.child, signal.SIGKILL)

    with lease("cuda:0", progress=kill_all_when_told) as found:
        assert found.gpus == ("GPU-a",)
    assert told == [f"waiting for 1 of 1 GPUs; GPU-a is held by process {holder.process.pid} (run 42)"]


class Stopped(Exception):
    pass


def stop(message):
    raise Stopped(message)


def test_a_gpu_stays_taken_while_a_child_of_a_killed_process_lives(lease, hold):
    holder = hold("cuda:0")
    holder.taken()
    holder.process.kill()
    holder.process.wait()
    with pytest.raises(Stopped, match="GPU-a is held by"), lease("cuda:0", progress=stop):
        pass
    os.kill(holder.child, signal.SIGKILL)
    with lease("cuda:0") as found:
        assert found.gpus == ("GPU-a",)


def test_a_wait_that_is_interrupted_gives_back_what_it_had_gathered(lease, hold):
    hold("cuda:1").taken()
    with pytest.raises(Stopped, match="waiting for 1 of 2 GPUs; GPU-b is held"), lease(count=2, progress=stop):
        pass
    with lease() as found:
        assert found.gpus == ("GPU-a",)


def test_two_that_want_several_do_not_wait_for_each_other_for_ever(lease, hold):
    first, second = hold("auto", 2), hold("auto", 2)
    line = {}
    # Whoever is first has both; the other gets both when that one is gone.
    for _ in range(600):
        ready, _, _ = select.select([first.process.stdout, second.process.stdout], [], [], 0.1)
        for stream in ready:
            line[stream] = stream.readline()
        if any(text.startswith("has") for text in line.values()):
            break
    winner, loser = (first, second) if line.get(first.process.stdout, "").startswith("has") else (second, first)
    winner.child = int(line[winner.process.stdout].split()[1])
    assert line[winner.process.stdout].split()[2:] == ["GPU-a", "GPU-b"]
    winner.process.kill()
    os.kill(winner.child, signal.SIGKILL)
    text = line.get(loser.process.stdout, "")
    while not text.startswith("has"):
        text = loser.process.stdout.readline()
        assert text, "the other one ended"
    loser.child = int(text.split()[1])
    assert text.split()[2:] == ["GPU-a", "GPU-b"]


def test_gpus_are_those_that_cuda_would_show(monkeypatch, tmp_path):
    for value, expected in (("2,GPU-x", ["2", "GPU-x"]), ("", []), ("0,-1,1", ["0"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert gpus.visible() == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-11'\necho '1, GPU-22'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus.visible() == ["GPU-11", "GPU-22"]


def test_an_nvidia_smi_that_fails_is_told_and_no_gpu_is_leased(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = []
    assert gpus.visible(told.append) == []
    assert told == ["no GPU is leased, because nvidia-smi fails: no driver"]


def test_an_index_and_a_uuid_of_one_gpu_are_one_lock(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-11'\necho '1, GPU-22'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("POLYPHONY_GPU_LEASES", str(tmp_path / "leases"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with gpus.lease("auto") as one:
        assert one.gpus == ("GPU-11",)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with gpus.lease("auto") as two:
            assert two.gpus == ("1",)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2,GPU-2")
        with gpus.lease("auto") as three:
            assert three.gpus == ("GPU-2",)


def test_a_gpu_that_is_named_twice_is_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,3")
    assert gpus.visible() == ["3"]


def test_a_step_of_this_process_uses_the_cpu_where_torch_cannot_use_the_gpus(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-11'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("POLYPHONY_GPU_LEASES", str(tmp_path / "leases"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with Polyphony().on_device("training", print) as config:
        assert config.training.device == "cpu"


@pytest.mark.parametrize(
    ("device", "processes", "expected"),
    [("auto", 1, "gpu"), ("auto", 0, "gpu_node"), ("cuda", 2, "gpu_node"), ("cpu", 2, "gpu"), ("cuda:1", 2, "gpu")],
)
def test_steps_that_use_several_gpus_have_a_pool_of_their_own(device, processes, expected):
    assert gpus.pool(device, processes) == expected
