"""In which precision models compute; their trained weights are float32 in all of them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from pipelines.config import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: str) -> str:
    """Return fp32, bf16 or fp16; 'auto' is bf16 on a GPU that computes with it, else fp32.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    is_gpu = torch.device(device).type == "cuda"
    if precision == "auto":
        return "bf16" if is_gpu and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and not is_gpu:
        raise ConfigError(
            f"training.precision = 'fp16' needs a GPU, found device {device!r}; use fp32, bf16 or auto there"
        )
    return precision


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a model computes in that (resolved) precision."""
    if precision not in DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[precision])
