"""Our scorers against the original code at full size: `python -m benchmarks.reference_parity [--tiny]`.

After `make reference`. Random weights of the published architectures in the published file formats; for hpsv2 and
image-reward the files are written by the packages' own classes. Odd images and prompts are scored by

    hpsv2, imagereward, aesthetic   the packages' own functions, in the environment of `make reference`
    pickscore                       transformers as in the model card, in this process
    ours                            pipelines.scoring

and the largest difference of a score is printed with the seconds per image, decoding and preprocessing included: the
original code takes one image and one prompt at a time, ours batches of 1 to 4. The runs alternate, each after a call that is
not counted and with prompts that neither has seen; the medians are printed with the machine. hpsv2 is measured twice: with
its checkpoint read once, and as people call it, where every call reads it again. The exit status is 1 if a score differs by
more than the tolerance.

Full size takes a quarter of an hour on two cores, 10 GB of disk and 14 GB of memory.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import transformers
from PIL import Image

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.images import decode
from pipelines.scoring import checkpoints, reference, scorer
from pipelines.scoring.pictures import CLIP_MEAN, CLIP_STD, Picture
from pipelines.scoring.published import LinearHead

Size = Literal["tiny", "full"]
TOLERANCE = {"hpsv2": 1e-5, "imagereward": 1e-4, "aesthetic": 1e-4, "pickscore": 1e-4}
BATCHES = (1, 2, 3, 4)
DISK_GB = {"tiny": 0.5, "full": 10.0}
MEMORY_GB = {"tiny": 4.0, "full": 14.0}
PYTHON = Path(ScorerConfig.model_fields["reference_python"].default)

JOBS: dict[Size, dict[str, dict[str, Any]]] = {
    "full": {"hpsv2": {}, "imagereward": {}},
    "tiny": {
        "hpsv2": {
            "architecture": {
                "embed_dim": 40,
                "vision_cfg": {"image_size": 224, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
            }
        },
        "imagereward": {
            "vit_config": {"img_size": 224, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 4},
            "med_config": {
                "vocab_size": 200,
                "hidden_size": 96,
                "intermediate_size": 160,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "max_position_embeddings": 512,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-12,
                "pad_token_id": 0,
                "encoder_width": 96,
                "add_cross_attention": True,
            },
        },
    },
}
"""What reference_driver makes; nothing given: the published size."""
TOWERS: dict[Size, dict[str, dict[str, Any]]] = {
    "full": {
        "aesthetic": {"vision": (1024, 24, 16), "text": (768, 12, 12), "act": "quick_gelu", "dim": 768},
        "pickscore": {"vision": (1280, 32, 16), "text": (1024, 24, 16), "act": "gelu", "dim": 1024},
    },
    "tiny": {
        "aesthetic": {"vision": (128, 3, 2), "text": (32, 1, 2), "act": "quick_gelu", "dim": 768},
        "pickscore": {"vision": (64, 3, 4), "text": (48, 2, 3), "act": "gelu", "dim": 40},
    },
}
"""CLIP's towers, patches of 14: width, layers and heads; ViT-L/14 and ViT-H/14 at full size."""
PROMPTS = (
    "a photo of a red cat in front of the castle",
    "",
    " ".join(f"river{i % 7} and light" for i in range(70)),
    "a cute robot \N{ROBOT FACE} holding a \N{SLICE OF PIZZA} \N{HEAVY BLACK HEART}\ufe0f",
    "the painterâ€™s cafÃ©",
    "cats &amp;amp; dogs &lt;b&gt;bold&lt;/b&gt; &eacute;",
    "a [SEP] of <end_of_text> the [ENC] dog",
    "赤い円、左上",
)


# --- pictures --------------------------------------------------------------------------------------------------------


def draw(width: int, height: int, seed: int) -> Image.Image:
    """Return coarse shapes with fine noise."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    coarse = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(coarse ^ rng.integers(0, 16, coarse.shape, dtype=np.uint8))


def odd_images(folder: Path) -> list[Path]:
    """Write eight images of odd shapes and modes; return their files."""
    alpha = draw(400, 260, 3)
    alpha.putalpha(draw(400, 260, 4).convert("L"))
    images = {
        "portrait.jpg": draw(300, 700, 0),
        "landscape.png": draw(640, 384, 1),
        "thin.png": draw(3, 1000, 2),
        "alpha.png": alpha,
        "palette.png": draw(200, 150, 5).quantize(32),
        "grey.png": draw(333, 251, 6).convert("L"),
        "cmyk.jpg": draw(280, 410, 7).convert("CMYK"),
        "bilevel.png": draw(320, 240, 8).convert("1"),
    }
    folder.mkdir()
    for name, image in images.items():
        image.save(folder / name)
    return [folder / name for name in images]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def write_checkpoint(kind: str, size: Size, folder: Path) -> ScorerConfig:
    """Write a random checkpoint in the published format; return its native scorer."""
    if kind in JOBS[size]:
        drive({"kind": kind, "folder": str(folder), "seed": 0, **JOBS[size][kind]}, folder)
    else:
        write_clip(folder, **TOWERS[size][kind])
        if kind == "pickscore":
            write_processor(folder)
        else:
            write_head(folder / "sac+logos+ava1-l14-linearMSE.pth", TOWERS[size][kind]["dim"])
    published: dict[str, Any] = {"hpsv2": "hpsv2.1"}
    return ScorerConfig(
        name=kind,
        kind=published.get(kind, kind),
        checkpoint=str(folder),
        batch_size=max(BATCHES),
        reference_python=str(PYTHON),
    )


def drive(job: dict[str, Any], folder: Path) -> None:
    """Let the packages' own classes write a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        subprocess.run(
            [str(PYTHON), "-I", str(reference.DRIVER), "make-checkpoint", file.name],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def write_clip(
    folder: Path, vision: tuple[int, int, int], text: tuple[int, int, int], act: str, dim: int, scale: float = 100.0
) -> None:
    """Write a folder of a CLIPModel with random weights, its logit scale the published models'."""

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**sizes, "num_attention_heads": heads, "hidden_act": act, "projection_dim": dim}

    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=dim,
            vision_config={**tower(*vision), "image_size": 224, "patch_size": 14},
            text_config={**tower(*text), "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407},
        )
    )
    randomise(model)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
    model.save_pretrained(folder)


def write_head(file: Path, features: int) -> None:
    """Write an aesthetic head whose scores of normalised features vary by about 1."""
    torch.manual_seed(1)
    head = LinearHead([features, 1024, 128, 64, 16, 1])
    randomise(head)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
                # A normalised feature is about features ** -0.5, and those of a random model are much alike.
                weight.mul_(10 * features**0.5 if name == "layers.0.weight" else 1)
    torch.save(head.state_dict(), file)


def randomise(model: torch.nn.Module) -> None:
    """Move every bias and every weight of a norm off 0 and 1, so that none can be lost or exchanged unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def write_processor(folder: Path) -> None:
    """Write the tokenizer's and the preprocessing's files of PickScore's processor."""
    with tempfile.TemporaryDirectory() as small:
        # The packages have CLIP's vocabulary.
        drive({"kind": "hpsv2", "folder": small, "seed": 0, **JOBS["tiny"]["hpsv2"]}, Path(small))
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(Path(small) / name, folder)
    options = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokenizer = {**special, "pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


# --- who scores ------------------------------------------------------------------------------------------------------


class ModelCard:
    """PickScore as its model card scores."""

    def __init__(self, folder: str) -> None:
        self._model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        self._processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
        self.facts = {"parameters": sum(p.numel() for p in self._model.parameters())}

    def close(self) -> None:
        """Let the model go."""
        del self._model

    @torch.inference_mode()
    def score(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return scores and seconds."""
        results = []
        for item in items:
            started = time.perf_counter()
            # The processor's own conversion of alpha is not the same in every version of transformers.
            image = Image.open(item["image"]).convert("RGB")
            pixels = self._processor(images=image, return_tensors="pt")
            options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
            tokens = self._tokenizer(item["prompt"], **options)
            image_embs = self._model.get_image_features(**pixels).pooler_output
            image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
            text_embs = self._model.get_text_features(**tokens).pooler_output
            text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
            score = (self._model.logit_scale.exp() * (text_embs @ image_embs.T)[0])[0].item()
            results.append({"score": score, "seconds": time.perf_counter() - started})
        return results


Original = ModelCard | reference.ReferenceProcess
"""Code that scores one image and one prompt at a time; see reference_driver for items and results."""


def original_of(config: ScorerConfig, **options: Any) -> Original:
    """Return the original code with the scorer's checkpoint loaded."""
    files = checkpoints.resolve(config)
    if config.kind == "pickscore":
        return ModelCard(config.checkpoint)
    if config.kind == "aesthetic":
        weights = next(str(path) for name, path in files.items() if name.endswith(".pth"))
        made = {"kind": "aesthetic", "checkpoint": weights, "backbone": str(files["config.json"].parent)}
        return reference.ReferenceProcess(PYTHON, made)
    return reference.ReferenceProcess(PYTHON, {**reference.specify(config, files), **options})


def ours(model: scorer.Scorer, pairs: Sequence[tuple[Path, str]]) -> tuple[list[float], float]:
    """Return our scores of (image, prompt)s in batches, and the seconds from files to scores."""
    started = time.perf_counter()
    paths = list(dict.fromkeys(path for path, _ in pairs))
    prepared = []
    for path in paths:
        data = path.read_bytes()
        prepared.append(model.prepare(Picture(decode(data), data)))
    model.encode_prompts([prompt for _, prompt in pairs])
    scores = model.score_pairs(prepared, [(paths.index(path), prompt) for path, prompt in pairs])
    return [float(s) for s in scores], time.perf_counter() - started


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What was found of a kind; seconds are per image."""

    kind: str
    parameters: int
    cases: int
    difference: float
    spread: float
    original_seconds: float
    our_seconds: dict[int, float]

    @property
    def is_equal(self) -> bool:
        """Return whether no score differs by more than the tolerance, among scores that vary by much more."""
        return self.difference <= TOLERANCE[self.kind] < self.spread / 10


def item(kind: str, path: Path, prompt: str) -> dict[str, Any]:
    """Return what the original code is asked; hpsv2 fails on alpha."""
    return {
        "image": str(path),
        "prompt": prompt,
        "convert": "RGB" if kind == "hpsv2" and path.stem == "alpha" else None,
    }


def alternate(
    kind: str,
    original: Original,
    model: scorer.Scorer,
    images: list[Path],
    repeats: int,
    batches: Sequence[int] = BATCHES,
) -> tuple[float, dict[int, float]]:
    """Return the medians of seconds per image of the original code and of ours, by batch size."""
    theirs: list[float] = []
    mine: dict[int, list[float]] = {size: [] for size in batches}
    for repeat in range(repeats):
        # A prompt that was seen is not encoded again by ours, which is not to be measured here.
        prompt = f"{PROMPTS[0]} at number {repeat} {type(original).__name__} {id(original)}"
        # Gigabytes of weights that lay idle while the other one computed are cold: a first call each is not counted.
        first = images[repeat % len(images)]
        original.score([item(kind, first, f"{prompt} once")])
        (result,) = original.score([item(kind, first, prompt)])
        ours(model, [(first, f"{prompt} once")])
        theirs.append(result["seconds"])
        for size in batches:
            pairs = [(images[(repeat + i) % len(images)], f"{prompt} {size} {i}") for i in range(size)]
            mine[size].append(ours(model, pairs)[1] / size)
    return statistics.median(theirs), {size: statistics.median(found) for size, found in mine.items()}


def measure(kind: str, size: Size, folder: Path, images: list[Path], repeats: int) -> tuple[Row, float | None]:
    """Compare and time one kind; of hpsv2 also return the seconds of a call that reads the checkpoint again."""
    say(f"{kind}: writing a checkpoint")
    config = write_checkpoint(kind, size, folder)
    say(f"{kind}: loading the original code and ours")
    original = original_of(config)
    pairs = [(path, PROMPTS[(i + shift) % len(PROMPTS)]) for shift in (0, 3) for i, path in enumerate(images)]
    found = original.score([item(kind, *pair) for pair in pairs])
    if failed := [(str(pair), r["error"]) for pair, r in zip(pairs, found, strict=True) if "error" in r]:
        raise RuntimeError(f"{kind}: the original code failed on {failed}")
    theirs = np.array([r["score"] for r in found])
    model = scorer.load(config)
    mine = np.array(ours(model, pairs)[0])
    say(f"{kind}: largest difference {np.abs(theirs - mine).max():.1e}; timing {repeats} alternating runs")
    # A side of 1000 pixels to 3 is resized to 75,000, which takes longer than a small model.
    ordinary = [path for path in images if path.stem != "thin"]
    seconds, batched = alternate(kind, original, model, ordinary, repeats, BATCHES if kind != "hpsv2" else BATCHES[:1])
    parameters = original.facts["parameters"]
    original.close()
    del original
    as_called = None
    if kind == "hpsv2":
        say(f"{kind}: timing {repeats} alternating runs with the checkpoint read at every call")
        reading = original_of(config, reload=True)
        # The first call also brings the file into the system's cache.
        reading.score([item(kind, images[0], "")])
        as_called, batched = alternate(kind, reading, model, ordinary, repeats)
        reading.close()
    row = Row(kind, parameters, len(pairs), float(np.abs(theirs - mine).max()), float(theirs.std()), seconds, batched)
    return row, as_called


def say(message: str) -> None:
    """Print progress."""
    print(f"[{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}] {message}", file=sys.stderr, flush=True)


def cpu() -> str:
    """Return the processor's name."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def report(rows: list[Row], as_called: float | None, size: Size, repeats: int, versions: dict[str, str]) -> str:
    """Return the tables as text."""
    out = io.StringIO()
    print(
        f"{size} size; seconds per image are medians of {repeats} alternating runs, file to score, prompts new\n",
        file=out,
    )
    batches = "  ".join(f"ours, {size}" for size in BATCHES)
    print(
        f"{'kind':12}{'parameters':>13}{'cases':>7}{'difference':>12}{'tolerance':>11}{'spread':>9}", end="", file=out
    )
    print(f"{'original':>10}  {batches}", file=out)
    for row in rows:
        print(f"{row.kind:12}{row.parameters:13,}{row.cases:7}{row.difference:12.1e}", end="", file=out)
        print(f"{TOLERANCE[row.kind]:11.0e}{row.spread:9.3f}{row.original_seconds:10.3f}", end="", file=out)
        print("  " + "  ".join(f"{row.our_seconds[size]:7.3f}" for size in BATCHES), file=out)
    print(
        "\nspread: standard deviation of the original scores over the cases; ours, N: in batches of N images", file=out
    )
    if as_called is not None:
        row = next(r for r in rows if r.kind == "hpsv2")
        ratios = ", ".join(f"{as_called / row.our_seconds[size]:.1f}x at {size}" for size in BATCHES)
        print(
            f"hpsv2 as it is called, img_score.score(image, prompt, cp=file), reads the checkpoint at every call: "
            f"{as_called:.3f} s for one image, {as_called - row.original_seconds:.3f} s of it for reading; ours is faster by "
            f"{ratios} images a batch",
            file=out,
        )
    numbers = ", ".join(f"{name} {v}" for name, v in versions.items())
    print(f"\noriginal: {numbers}", file=out)
    mine = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    print(f"ours: {', '.join(f'{name} {v}' for name, v in mine.items())}", file=out)
    load = "/".join(f"{n:.1f}" for n in os.getloadavg())
    print(f"machine: {cpu()}, {torch.get_num_threads()} threads of {os.cpu_count()}, load {load} at the end", file=out)
    return out.getvalue()


def require_room(size: Size, folder: Path) -> None:
    """Refuse to start where disk or memory would run out.

    Raises:
        OSError: says what is there and what is needed.
    """
    disk, memory = shutil.disk_usage(folder).free / 1e9, psutil.virtual_memory().available / 1e9
    if disk < DISK_GB[size] or memory < MEMORY_GB[size]:
        raise OSError(
            f"{folder}: {disk:.1f} GB of disk and {memory:.1f} GB of memory are free, {DISK_GB[size]} and {MEMORY_GB[size]} "
            f"are needed; set --folder to another disk, or run with --tiny"
        )


def main() -> int:
    """Print the tables; return 1 if a score differs by more than the tolerance, 2 if it cannot run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small models: a minute instead of fifteen")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs per median")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are put")
    parser.add_argument("--kinds", nargs="+", choices=tuple(TOLERANCE), default=tuple(TOLERANCE))
    options = parser.parse_args()
    size: Size = "tiny" if options.tiny else "full"
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    as_called = None
    versions: dict[str, str] = {}
    try:
        if not PYTHON.exists():
            raise CheckpointError(f"{PYTHON} is missing; run `make reference`")
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            images = odd_images(Path(folder) / "images")
            for kind in options.kinds:
                require_room(size, Path(folder))
                row, seconds = measure(kind, size, Path(folder) / kind, images, options.repeats)
                rows.append(row)
                as_called = seconds if seconds is not None else as_called
                # One full checkpoint at a time.
                shutil.rmtree(Path(folder) / kind)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    answer = subprocess.run(
        [str(PYTHON), "-I", str(reference.DRIVER), "check"], capture_output=True, text=True, check=True
    ).stdout
    versions = json.loads(answer)
    print(report(rows, as_called, size, options.repeats, versions))
    wrong = [row.kind for row in rows if not row.is_equal]
    if wrong:
        print(f"beyond tolerance, or scores that hardly vary: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
