"""Exported models: folders that plain diffusers loads.

    full    the pipeline: the trained UNet, every other part a copy of the base's files
    lora    pytorch_lora_weights.safetensors for `pipe.load_lora_weights(folder)`, and base.json: what it belongs to

A LoRA that was trained on top of another export belongs to that one: base.json names its folder, relative to its own.
Belongs here: what lies in such a folder. Does not belong here: how weights are trained (`adapters`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict

from pipelines.hub import CheckpointError
from pipelines.identity import file_digest, fingerprint
from trainers.backbones.adapters import ADAPTER
from trainers.backbones.folders import INDEX, PARTS, Checkpoint, weight_files

LORA_FILE, BASE_FILE = "pytorch_lora_weights.safetensors", "base.json"
Kind = Literal["full", "lora"]


def kind(folder: Path) -> Kind | None:
    """Return which sort of export lies in a folder; None: none that is complete."""
    if (folder / LORA_FILE).is_file() and (folder / BASE_FILE).is_file():
        return "lora"
    is_full = all(f.is_file() for f in _unet_files(folder))
    return "full" if is_full else None


def require(folder: Path) -> Kind:
    """Return which sort of export lies in a folder.

    Raises:
        CheckpointError: none does; the message names the first file that is missing.
    """
    found = kind(folder)
    if found is None:
        files = [folder / LORA_FILE, folder / BASE_FILE] if (folder / LORA_FILE).is_file() else _unet_files(folder)
        missing = next(f for f in files if not f.is_file())
        raise CheckpointError(f"exported model: {missing} is missing; train the recipe again, or name a whole export")
    return found


def mark(folder: Path) -> str:
    """Return the fingerprint of an export's weights (of a base's UNet, too)."""
    files = [folder / LORA_FILE, folder / BASE_FILE] if require(folder) == "lora" else _unet_files(folder)
    return fingerprint(files={f.name: file_digest(f) for f in files})


def _unet_files(folder: Path) -> list[Path]:
    return [folder / "unet" / "config.json", *weight_files(folder / "unet")]


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder beside it to write into; it takes the place of `folder` where nothing is raised within."""
    staging = folder.with_name(folder.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def write_full(unet: UNet2DConditionModel, checkpoint: Checkpoint, folder: Path) -> None:
    """Write a pipeline's folder: the files of the base's parts that are used, byte for byte, and this UNet.

    Parts that training does not know (safety checker, image encoder) are left out, and model_index.json says so.
    """
    kept = PARTS[checkpoint.pipeline]
    index: dict[str, Any] = {
        name: [None, None] if isinstance(value, list) and name not in kept else value
        for name, value in checkpoint.index.items()
    }
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    with staged(folder) as staging:
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for part in kept.keys() - {"unet"}:
            (staging / part).mkdir()
            for file in checkpoint.files[part]:
                shutil.copyfile(file, staging / part / file.name)
        unet.save_pretrained(staging / "unet")


def write_lora(
    unet: UNet2DConditionModel,
    pipeline: type[StableDiffusionPipeline],
    folder: Path,
    *,
    base: dict[str, str],
    start: Path | None,
) -> None:
    """Write the adapters of a UNet, with their rank and alpha, and what they belong to.

    Args:
        base: what base.json says of the base (checkpoint, digest, unet).
        start: the export whose UNet they were trained on; None: the base's.
    """
    told: dict[str, Any] = {**base, "start": None}
    if start is not None:
        told["start"] = {"folder": os.path.relpath(start.resolve(), folder.resolve()), "weights": mark(start)}
    with staged(folder) as staging:
        pipeline.save_lora_weights(
            staging,
            unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=ADAPTER),
            unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
        )
        (staging / BASE_FILE).write_text(json.dumps(told, indent=2) + "\n")


# --- reading ---------------------------------------------------------------------------------------------------------


def start_of(folder: Path, unet_mark: str) -> Path | None:
    """Return the export that a LoRA was trained on, None where that is the base.

    Args:
        unet_mark: mark of the base's UNet.

    Raises:
        CheckpointError: it was trained on another base, or the export it was trained on is gone or another by now.
    """
    told = json.loads((folder / BASE_FILE).read_text())
    if told["unet"] != unet_mark:
        raise CheckpointError(
            f"{folder / BASE_FILE}: trained on the UNet {told['unet']} of {told['checkpoint']}, the backbone's is "
            f"{unet_mark}; set backbones.checkpoint to that one"
        )
    if told["start"] is None:
        return None
    start = (folder / told["start"]["folder"]).resolve()
    if mark(start) != told["start"]["weights"]:
        raise CheckpointError(
            f"{folder / BASE_FILE}: the export it was trained on, {start}, holds other weights by now"
        )
    return start


def fuse(unet: UNet2DConditionModel, folder: Path) -> UNet2DConditionModel:
    """Return the UNet with a LoRA's weights added to its own: W + (alpha / rank) B A.

    Raises:
        CheckpointError: the file holds no LoRA of a UNet.
    """
    # Adapters are drawn before they are read; nobody else's randomness is to notice.
    with torch.random.fork_rng(devices=[]):
        unet.load_lora_adapter(folder, prefix="unet", weight_name=LORA_FILE, adapter_name=ADAPTER)
    if ADAPTER not in getattr(unet, "peft_config", {}):
        raise CheckpointError(f"{folder / LORA_FILE}: holds no weights of a UNet's adapters; export the model again")
    unet.fuse_lora()
    unet.unload_lora()
    return unet
