"""The folder of a backbone: which files of it are used, which are missing, of which family it is, its digest.

A diffusers folder often holds each weight several times (fp16, EMA, pickled, ONNX); only what is loaded is fetched, digested
and copied. Belongs here: files, and what their JSON says. Does not belong here: weights and what is computed with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import BackboneConfig, ConfigError
from pipelines.hub import CheckpointError, local_folder
from pipelines.identity import file_digest, fingerprint

INDEX = "model_index.json"
PARTS: dict[str, dict[str, str]] = {
    "StableDiffusionPipeline": {
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "vae": "AutoencoderKL",
        "scheduler": "",
    },
    "StableDiffusionXLPipeline": {
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "vae": "AutoencoderKL",
        "scheduler": "",
    },
}
"""Pipeline -> its parts and their classes as model_index.json names them; '': any, our own is made from its numbers."""

_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tiny": ("StableDiffusionPipeline", ("epsilon", "v_prediction")),
    "sd15": ("StableDiffusionPipeline", ("epsilon",)),
    "sd21": ("StableDiffusionPipeline", ("epsilon", "v_prediction")),
    "sdxl": ("StableDiffusionXLPipeline", ("epsilon", "v_prediction")),
}
"""Family -> pipeline and what its UNets may predict (SD2.1-base predicts epsilon, SD2.1 at 768 pixels v)."""
_PUBLISHED_WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""Cross-attention width -> whose it is. Any other width passes, so that small models of every family can be made."""
_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"
_PICKLED = {_DIFFUSERS: "diffusion_pytorch_model.bin", _TRANSFORMERS: "pytorch_model.bin"}
_TOKENIZERS = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """A backbone's folder as found: its pipeline's class, model_index.json, and the files of every part that are used."""

    folder: Path
    pipeline: str
    index: dict[str, Any]
    files: dict[str, tuple[Path, ...]]

    def part(self, name: str) -> Path:
        """Return the folder of a part; of the autoencoder the one that stands in for the checkpoint's, if there is one."""
        return self.files[name][0].parent

    def marks(self, *parts: str) -> dict[str, str]:
        """Return '<part>/<file>' -> sha256 of the files of some parts; of all without an argument."""
        return {f"{p}/{f.name}": file_digest(f) for p in parts or self.files for f in self.files[p]}


def find(config: BackboneConfig) -> Checkpoint:
    """Return the backbone's files, fetching them first where the configuration has a hub id.

    Raises:
        CheckpointError: the folder or a part of it is missing.
        ConfigError: what lies there is not of the family that the configuration says.
    """
    who = f"backbone {config.name!r}"
    folder = local_folder(who, "backbones.checkpoint", config.checkpoint, wanted())
    index = _read(who, folder / INDEX)
    pipeline = _pipeline(config, folder, index)
    places = {name: folder / name for name in PARTS[pipeline]}
    if config.vae:
        places["vae"] = local_folder(who, "backbones.vae", config.vae, _wanted_of("vae", ""))
    files = {name: _files(who, name, place) for name, place in places.items()}
    checkpoint = Checkpoint(folder, pipeline, index, files)
    _check_family(config, checkpoint)
    return checkpoint


def resolve(config: BackboneConfig) -> Path:
    """Return the local diffusers folder of a backbone, fetching it if it is a hub id.

    Raises:
        CheckpointError, ConfigError: see find.
    """
    return find(config).folder


def digest(config: BackboneConfig) -> str:
    """Return 16 hex characters of the backbone's files and resolution: the key of everything cached with it.

    Raises:
        CheckpointError, ConfigError: see find.
    """
    return digest_of(find(config), config.resolution)


def digest_of(checkpoint: Checkpoint, resolution: int) -> str:
    """Return the digest of a checkpoint at a resolution; see digest."""
    return fingerprint(files=checkpoint.marks(), resolution=resolution)


def unet_folder(config: BackboneConfig) -> Path:
    """Return the folder with the UNet's configuration, fetching no weights.

    Raises:
        CheckpointError: it is missing.
    """
    who = f"backbone {config.name!r}"
    folder = local_folder(who, "backbones.checkpoint", config.checkpoint, (INDEX, "unet/config.json"))
    _read(who, folder / "unet" / "config.json")
    return folder / "unet"


def weight_files(folder: Path, stem: str = _DIFFUSERS) -> tuple[Path, ...]:
    """Return the files of a model's weights: one, or an index and its shards, else the pickled one.

    Where there is none, the first one that is looked for.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return (index, *(folder / s for s in shards))
    whole, pickled = folder / f"{stem}.safetensors", folder / _PICKLED[stem]
    return (pickled if pickled.is_file() and not whole.is_file() else whole,)


def wanted() -> tuple[str, ...]:
    """Return patterns of the files of a hub repository that are used, whatever its pipeline; no pickled weights."""
    parts = dict.fromkeys(p for parts in PARTS.values() for p in parts)
    return (INDEX, *(name for part in parts for name in _wanted_of(part, f"{part}/")))


# --- parts -----------------------------------------------------------------------------------------------------------


def _stem(part: str) -> str:
    return _DIFFUSERS if part in ("unet", "vae") else _TRANSFORMERS


def _files(who: str, part: str, folder: Path) -> tuple[Path, ...]:
    """Return the files of a part that are used, its configuration first, all of them there."""
    if part.startswith("tokenizer"):
        found = tuple(sorted(f for f in folder.glob("*") if f.is_file()))
        if not any(f.name in _TOKENIZERS for f in found):
            raise _missing(who, folder / _TOKENIZERS[0])
        return found
    if part == "scheduler":
        files: tuple[Path, ...] = (folder / "scheduler_config.json",)
    else:
        files = (folder / "config.json", *weight_files(folder, _stem(part)))
    for file in files:
        if not file.is_file():
            raise _missing(who, file)
    return files


def _missing(who: str, file: Path) -> CheckpointError:
    others = sorted(f.name for f in file.parent.glob("*") if f.is_file())
    beside = f"; beside it lie {others}" if others else ""
    return CheckpointError(
        f"{who}: {file} is missing{beside}; expected a diffusers folder with {INDEX} and weights named as diffusers names "
        "them without a variant. The tiny backbone is made by `python -m trainers.world_models`"
    )


def _read(who: str, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise _missing(who, file)
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{who}: {file} is no valid JSON ({error}); fetch it again") from error


def _wanted_of(part: str, prefix: str) -> tuple[str, ...]:
    if part.startswith("tokenizer"):
        return (f"{prefix}*",)
    if part == "scheduler":
        return (f"{prefix}scheduler_config.json",)
    names = ("config.json", "{}.safetensors", "{}.safetensors.index.json", "{}-?????-of-?????.safetensors")
    return tuple(prefix + n.format(_stem(part)) for n in names)


# --- family ----------------------------------------------------------------------------------------------------------


def _pipeline(config: BackboneConfig, folder: Path, index: dict[str, Any]) -> str:
    found, expected = str(index.get("_class_name")), _FAMILIES[config.family][0]
    if found != expected:
        fitting = sorted(f for f, (pipeline, _) in _FAMILIES.items() if pipeline == found)
        advice = f"family is one of {fitting}" if fitting else f"pipelines of the kinds {sorted(PARTS)} can be trained"
        raise _wrong(config, f"{folder / INDEX} says {found}", f"{expected}; {advice}")
    for part, kind in PARTS[found].items():
        said = (index.get(part) or [None, None])[1]
        if kind and said != kind:
            raise _wrong(config, f"{folder / INDEX} says {said} of {part}", kind)
    return found


def _check_family(config: BackboneConfig, checkpoint: Checkpoint) -> None:
    who, (_, predictions) = f"backbone {config.name!r}", _FAMILIES[config.family]
    scheduler = checkpoint.files["scheduler"][0]
    prediction = _read(who, scheduler).get("prediction_type", "epsilon")
    if prediction not in predictions:
        raise _wrong(config, f"{scheduler} says prediction_type {prediction!r}", f"one of {list(predictions)}")
    unet = checkpoint.files["unet"][0]
    width = _read(who, unet).get("cross_attention_dim")
    owner = _PUBLISHED_WIDTHS.get(width) if isinstance(width, int) else None
    if owner not in (None, config.family):
        raise _wrong(config, f"{unet} says cross_attention_dim {width}", f"family {owner!r}")
    vae = checkpoint.files["vae"][0]
    said = _read(who, vae)
    if said.get("latents_mean") is not None:
        raise _wrong(config, f"{vae} has latents_mean", "latents scaled by one number (scaling_factor)")
    if said.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise _wrong(config, f"{vae} says {said['_class_name']}", "AutoencoderKL; set backbones.vae to another one")


def _wrong(config: BackboneConfig, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"backbone {config.name!r}: backbones.family is {config.family!r}, but {found}; expected {expected}. "
        "Set backbones.family to what lies in the folder, or backbones.checkpoint to another one"
    )
