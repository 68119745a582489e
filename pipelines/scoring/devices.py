"""Which devices models run on."""

from __future__ import annotations

from pipelines.config import ConfigError


def resolve_device(device: str) -> str:
    """Return the device to use: 'auto' is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: a CUDA device that is not there.
    """
    if device != "auto" and not device.startswith("cuda"):
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    count, number = torch.cuda.device_count(), device.partition(":")[2] or "0"
    if not (number.isdecimal() and int(number) < count):
        raise ConfigError(
            f"device = {device!r}: torch {torch.__version__} sees {count} CUDA devices; set scoring.device or "
            f"training.device to 'auto' or 'cpu', or install a torch with CUDA"
        )
    return device


def places(device: str, workers: int) -> list[str]:
    """Return one device per worker process.

    Args:
        device: of resolve_device; 'cuda' stands for all GPUs, in turn.
        workers: 0: one per GPU ('cuda'), else one.
    """
    if device != "cuda":
        return [device] * max(1, workers)
    import torch

    gpus = max(1, torch.cuda.device_count())
    if workers == 1:
        return ["cuda"]
    return [f"cuda:{i % gpus}" for i in range(workers or gpus)]
