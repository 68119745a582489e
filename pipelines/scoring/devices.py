"""Which device a model runs on."""

from __future__ import annotations


def resolve_device(device: str) -> str:
    """Return the device to use: 'auto' is CUDA where there is one, else the CPU."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
