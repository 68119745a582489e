"""Who has which GPU of this machine: a lock per GPU, held by the processes that use it and by nobody after them.

    with gpus.lease("auto", 2, progress=context.log.info) as found: ...   # found.environment, found.device, found.descriptors

The locks are advisory file locks (flock) in one folder per machine. A process that inherits `found.descriptors` holds the
GPU too, so that a lease lives exactly as long as the last process of its tree and is free after any kind of death.

Belongs here: finding, taking and giving back GPUs. Does not belong here: how many steps run at once (Dagster's pools).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.config import ConfigError

FOLDER_VARIABLE = "POLYPHONY_GPU_LEASES"
VISIBLE = "CUDA_VISIBLE_DEVICES"
POOL, NODE_POOL = "gpu", "gpu_node"
"""Dagster's pools: steps that use one device, and steps that use several."""
POLL_SECONDS = 0.5
SECONDS_BETWEEN_MESSAGES = 60.0
_NVIDIA_SMI_SECONDS = 30


@dataclass(frozen=True)
class Lease:
    """What was taken: no GPU where there is none or none is wanted."""

    device: str
    """For this process: 'cuda:3', 'cuda' where several were taken, or what was asked for where none was."""
    gpus: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """For a child whose device is 'auto' or 'cuda': it sees these GPUs alone."""
    descriptors: tuple[int, ...] = ()
    """For a child to inherit (`pass_fds`), so that the lease lives as long as it."""


def pool(device: str, processes: int) -> str:
    """Return the pool of a step that runs that many processes (0: one per GPU) on a device."""
    return POOL if processes == 1 or not _is_several(device) else NODE_POOL


def _is_several(device: str) -> bool:
    return device in ("auto", "cuda")


def visible(progress: Callable[[str], None] = lambda message: None) -> list[str]:
    """Return the GPUs that a process started here would see, in CUDA's order, as CUDA_VISIBLE_DEVICES names them.

    Machines with cards of several kinds need CUDA_DEVICE_ORDER=PCI_BUS_ID: CUDA counts the fastest first otherwise,
    nvidia-smi does not.
    """
    if (chosen := os.environ.get(VISIBLE)) is not None:
        names = [name.strip() for name in chosen.split(",")]
        # CUDA stops at the first that is no device.
        end = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
        return list(dict.fromkeys(names[:end]))
    return list(_uuids(progress).values())


def _uuids(progress: Callable[[str], None] = lambda message: None) -> dict[str, str]:
    """Return index -> UUID of the machine's GPUs, by nvidia-smi; none without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    asked = [command, "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stdout", None) or error
        progress(f"no GPU is leased, because nvidia-smi fails: {str(said).strip()}")
        return {}
    rows = [line.split(",") for line in done.stdout.splitlines() if "," in line]
    return {index.strip(): uuid.strip() for index, uuid in rows}


def leases_folder() -> Path:
    """Return the machine's folder of locks: $POLYPHONY_GPU_LEASES, else polyphony-gpus among the temporary files."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(tempfile.gettempdir()) / "polyphony-gpus")


@contextlib.contextmanager
def lease(
    device: str,
    count: int = 1,
    *,
    gpus: Sequence[str] | None = None,
    folder: Path | None = None,
    holder: str = "",
    progress: Callable[[str], None] = lambda message: None,
) -> Iterator[Lease]:
    """Take GPUs, waiting until they are free, and give them back at the end.

    Args:
        device: 'auto' or 'cuda': any free ones; 'cuda:1': that one, as torch counts them here; others need none.
        count: how many; 0, or more than there are: all.
        gpus: names of the GPUs; default: `visible`.
        folder: of the locks; default: `leases_folder`.
        holder: who takes them, for those who wait.
        progress: gets lines about the waiting.

    Raises:
        ConfigError: there are GPUs, but not the one of `device`.
    """
    if device != "auto" and not device.startswith("cuda"):
        yield Lease(device)
        return
    names = list(visible(progress) if gpus is None else gpus)
    if not names:
        yield Lease(device)
        return
    choice = names if _is_several(device) else [_chosen(device, names)]
    wanted = min(count or len(choice), len(choice))
    locks = _Locks(folder or leases_folder(), holder, _uuids() if gpus is None else {})
    try:
        taken = locks.take(choice, wanted, progress)
        index = {name: i for i, name in enumerate(names)}
        yield Lease(
            device=f"cuda:{index[taken[0]]}" if wanted == 1 else "cuda",
            gpus=tuple(taken),
            # A child that is told 'cuda:1' counts as we do.
            environment={VISIBLE: ",".join(taken)} if _is_several(device) else {},
            descriptors=locks.descriptors,
        )
    finally:
        locks.close()


def _chosen(device: str, names: list[str]) -> str:
    number = device.partition(":")[2]
    if not (number.isdecimal() and int(number) < len(names)):
        raise ConfigError(
            f"device = {device!r}: this machine shows {len(names)} GPUs; set 'auto', 'cuda' or one of them"
        )
    return names[int(number)]


class _Locks:
    """The locks that one lease holds."""

    def __init__(self, folder: Path, holder: str, uuids: dict[str, str]) -> None:
        self._folder, self._holder, self._uuids = folder, holder, uuids
        self._held: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):
            # Of several people on one machine the first has made it.
            folder.chmod(0o1777)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(self._held.values())

    def take(self, choice: list[str], wanted: int, progress: Callable[[str], None]) -> list[str]:
        """Take that many of the choice; return them."""
        # One lease at a time gathers several GPUs: two that hold some and wait for more would wait for ever.
        turn = [self._wait_for_turn(progress)] if wanted > 1 else []
        told = float("-inf")
        try:
            while len(self._held) < wanted:
                for name in choice:
                    if len(self._held) < wanted and name not in self._held:
                        self._try(name)
                if len(self._held) < wanted:
                    if time.monotonic() - told > SECONDS_BETWEEN_MESSAGES:
                        told = time.monotonic()
                        progress(
                            f"waiting for {wanted - len(self._held)} of {len(choice)} GPUs; {self._others(choice)}"
                        )
                    time.sleep(POLL_SECONDS)
        finally:
            for descriptor in turn:
                os.close(descriptor)
        return [name for name in choice if name in self._held]

    def _wait_for_turn(self, progress: Callable[[str], None]) -> int:
        descriptor, is_told = self._open("several"), False
        try:
            while not _lock(descriptor):
                if not is_told:
                    progress("waiting for others that gather several GPUs")
                is_told = True
                time.sleep(POLL_SECONDS)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _try(self, name: str) -> None:
        descriptor = self._open(name)
        if not _lock(descriptor):
            os.close(descriptor)
            return
        self._held[name] = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} {self._holder}".strip().encode(), 0)

    def _others(self, choice: list[str]) -> str:
        said = []
        for name in choice:
            if name not in self._held:
                who = self._path(name).read_text(errors="replace")
                said.append(f"{name} is held by {who or 'an unknown process'}")
        return ", ".join(said)

    def _path(self, name: str) -> Path:
        # An index, a UUID and the beginning of a UUID may name the same GPU.
        begun = (uuid for uuid in self._uuids.values() if name.startswith("GPU-") and uuid.startswith(name))
        known = self._uuids.get(name) or next(begun, name)
        return self._folder / f"{known.replace('/', '_')}.lock"

    def _open(self, name: str) -> int:
        path, flags = self._path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        # Not with one call: Linux refuses O_CREAT on another user's file in a folder that all may write to.
        while True:
            try:
                return os.open(path, flags)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                    os.fchmod(descriptor, 0o666)
                    return descriptor

    def close(self) -> None:
        """Let go of them; processes that have inherited them hold them on."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()


def _lock(descriptor: int) -> bool:
    """Return whether the lock was free and is ours now."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
