"""Which devices models run on."""

from __future__ import annotations


def resolve_device(device: str) -> str:
    """Return the device to use: 'auto' is CUDA where there is one, else the CPU."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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
