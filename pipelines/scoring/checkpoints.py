"""Where a reward model's files lie and which revision they are; needs no torch, so that staleness is cheap to ask.

Belongs here: kinds of scorers, their files and digests. Does not belong here: loading weights into a model.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError, local_folder
from pipelines.identity import file_digest, fingerprint

REVISION_CHARACTERS = 12


class ScoringError(RuntimeError):
    """A model, a judge of one's own or a worker failed; the message says which, on what, and what to do."""


@dataclass(frozen=True)
class Need:
    """Files that a kind needs: one of several sets, from the folder that an option of the scorer names.

    hub: where they are published; used where the option is empty and the checkpoint's folder has none of the sets.
    """

    option: str
    sets: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    hub: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of scorer: the module that implements it, the version of its preprocessing, and its files."""

    module: str
    preprocessing: str
    needs: tuple[Need, ...] = ()


_MODEL = (("config.json", "model.safetensors"), ("config.json", "pytorch_model.bin"))
_TOKENIZER = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Either of these sets makes a CLIP tokenizer."""
_TOKENIZER_OPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def _clip_folder(hub: str) -> tuple[Need, ...]:
    return (
        Need("checkpoint", _MODEL, hub=hub),
        Need("processor", (("preprocessor_config.json",),), hub=_VIT_H),
        Need("processor", _TOKENIZER, _TOKENIZER_OPTIONS, hub=_VIT_H),
    )


def _hpsv2(file: str) -> tuple[Need, ...]:
    return (
        Need("checkpoint", ((file,),), ("open_clip_config.json",), hub="xswu/HPSv2"),
        Need("processor", tuple(reversed(_TOKENIZER)), hub=_VIT_H),
    )


KINDS: dict[str, Kind] = {
    "pickscore": Kind("pickscore", "rgb,shortest-bicubic-pil,crop-floor:2", _clip_folder("yuvalkirstain/PickScore_v1")),
    "clip": Kind("clip_score", "rgb,shortest-bicubic-pil,crop-floor:2", _clip_folder(_VIT_H)),
    "hpsv2": Kind("hpsv2", "rgb,longest-bicubic-float-antialias,pad:1", _hpsv2("HPS_v2_compressed.pt")),
    "hpsv2.1": Kind("hpsv2", "rgb,longest-bicubic-float-antialias,pad:1", _hpsv2("HPS_v2.1_compressed.pt")),
    "imagereward": Kind(
        "imagereward",
        "own-mode,shortest-bicubic-pil,crop-round:1",
        (
            Need("checkpoint", (("ImageReward.pt", "med_config.json"),), ("vit_config.json",), hub="THUDM/ImageReward"),
            Need("processor", (("vocab.txt",),), ("tokenizer_config.json",), hub="google-bert/bert-base-uncased"),
        ),
    ),
    "aesthetic": Kind(
        "aesthetic",
        "own-mode,shortest-bicubic-pil,crop-round:1",
        (
            Need("checkpoint", (("sac+logos+ava1-l14-linearMSE.pth",),)),
            Need("backbone", _MODEL, hub="openai/clip-vit-large-patch14"),
        ),
    ),
    "imported": Kind("imported", "none:1"),
    "custom": Kind("custom", "own:1"),
}
HOW_TO_GET = {
    "sac+logos+ava1-l14-linearMSE.pth": "the file lies in the repository christophschuhmann/improved-aesthetic-predictor "
    "on GitHub; download it and set the scorer's checkpoint to it",
}


def resolve(scorer: ScorerConfig) -> dict[str, Path]:
    """Return file name -> local path of everything that a scorer is made of, fetching what hub ids name.

    Raises:
        CheckpointError: a folder or a file is missing; the message names it and the command that fetches it.
    """
    found: dict[str, Path] = {}
    for need in KINDS[scorer.kind].needs:
        found |= _find(scorer, need)
    return found


def _find(scorer: ScorerConfig, need: Need) -> dict[str, Path]:
    given = getattr(scorer, need.option)
    places = [given] if given else [scorer.checkpoint, *([need.hub] if need.hub else [])]
    looked: list[Path] = []
    failed: CheckpointError | None = None
    for place in places:
        # A checkpoint that is named as a file may have another name than the published one.
        file = Path(place) if len(need.sets) == 1 and need.option == "checkpoint" else None
        for chosen in need.sets:
            try:
                # One set after the other: a hub's repository may hold the weights in two formats.
                folder = _folder(scorer, need.option, place, sorted({*chosen, *need.optional}))
            except CheckpointError as error:
                failed = error
                break
            looked.append(folder)
            paths = {n: folder / n for n in chosen}
            if file is not None and file.is_file():
                paths[chosen[0]] = file
            if all(p.exists() for p in paths.values()):
                return paths | {n: folder / n for n in need.optional if (folder / n).exists()}
    if failed is not None and not looked:
        raise failed
    missing = next(n for n in need.sets[0] if not (looked[0] / n).exists())
    how = HOW_TO_GET.get(missing) or (
        f"`hf download {need.hub} --local-dir FOLDER` fetches it; set the scorer's {need.option} to FOLDER"
    )
    raise CheckpointError(
        f"scorer {scorer.name!r} ({scorer.kind}): {looked[0] / missing} is missing; expected "
        f"{' or '.join(str(list(s)) for s in need.sets)} in the folder of its {need.option}. {how}. The small world's models "
        f"are made by `python -m trainers.world_models`"
    )


@functools.lru_cache(maxsize=64)
def _hub_folder(what: str, option: str, place: str, names: tuple[str, ...]) -> Path:
    return local_folder(what, option, place, names)


def _folder(scorer: ScorerConfig, option: str, place: str, names: list[str]) -> Path:
    folder = _hub_folder(f"scorer {scorer.name!r}", f"the scorer's {option}", place, tuple(names))
    return folder.parent if folder.is_file() else folder


def revision(scorer: ScorerConfig) -> str:
    """Return 12 hex characters: the files' content, our preprocessing's version, precision and backend.

    Of a custom scorer the source file of its function stands for the weights, with its options and its own `revision`.
    """
    kind = KINDS[scorer.kind]
    parts: dict[str, object] = {"files": _digests(resolve(scorer)), "kind": scorer.kind}
    parts["preprocessing"] = kind.preprocessing
    if scorer.precision != "float32":
        parts["precision"] = scorer.precision
    if scorer.backend != "native":
        parts |= {"backend": scorer.backend, "packages": _packages(scorer)}
    if scorer.kind == "imported":
        parts |= _imported(scorer)
    if scorer.kind == "custom":
        parts |= {"function": scorer.function, "options": scorer.options, "revision": scorer.revision}
        parts["source"] = file_digest(custom_source(scorer))
    return fingerprint(**parts)[:REVISION_CHARACTERS]


def _packages(scorer: ScorerConfig) -> list[str]:
    """Return the versions of what computes the scores in the original packages' environment."""
    names = ("hpsv2-", "image_reward-", "torch-", "torchvision-", "transformers-", "timm-", "pillow-")
    found = Path(scorer.reference_python).parent.parent.glob("lib/python*/site-packages/*.dist-info")
    return sorted(p.name for p in found if p.name.startswith(names))


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: file_digest(path) for name, path in files.items()}


def _imported(scorer: ScorerConfig) -> dict[str, object]:
    from pipelines.scoring import imported

    return imported.identity(scorer)


def custom_source(scorer: ScorerConfig) -> Path:
    """Return the source file of a custom scorer's module.

    Raises:
        CheckpointError: the module is not found, or the option is not `module:function`.
    """
    module, _, function = scorer.function.partition(":")
    try:
        spec = importlib.util.find_spec(module) if module and function else None
    except Exception:
        # A module in a package is found by importing the package, whose code may raise anything.
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise CheckpointError(
            f"scorer {scorer.name!r}: function = {scorer.function!r}: expected 'module:function' of a module that Python "
            f"finds; set PYTHONPATH to its folder or install it"
        )
    return Path(spec.origin)
