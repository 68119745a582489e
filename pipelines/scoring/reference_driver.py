"""Runs the packages hpsv2 1.2.0 and image-reward 1.5, whose own functions compute the scores: float32, on the CPU.

Started as a file by the interpreter of the environment that `make reference` installs:

    reference_driver.py check                     import the packages, print their versions
    reference_driver.py score JOB RESULT          one job, both JSON files
    reference_driver.py serve PARENT              JSON lines on stdin and stdout, the model loaded once; ends with PARENT
    reference_driver.py make-checkpoint JOB       random weights in the published format, of the packages' own classes

A job of `score` is {"model": SPECIFICATION, "items": [ITEM, ...]}, its result {"facts": {...}, "results": [RESULT, ...]}.
`serve` answers {"load": SPECIFICATION} with {"facts": {...}}, {"items": [ITEM, ...]} with {"results": [RESULT, ...]} and
a failure with {"error": "..."}.

    SPECIFICATION   kind         hpsv2 | imagereward | aesthetic
                    checkpoint   the published file
                    architecture hpsv2, optional: JSON of open_clip, plain or under `model_cfg`; ViT-H-14 without
                    med_config   imagereward: the published JSON
                    vocabulary   imagereward: vocab.txt, a tokenizer_config.json may lie next to it
                    vit_config   imagereward, optional: JSON of img_size, patch_size, embed_dim, depth, num_heads; else ViT-L
                    backbone     aesthetic: folder of a transformers CLIPModel
                    dtype        float32
                    reload       hpsv2, optional: true leaves it to read the checkpoint again at every call, as it does
    ITEM            image: path; prompt; convert: mode that the image is converted to, null: the package opens it
    RESULT          score and seconds, or error: what the package raised

Belongs here: everything that it takes to make the packages run. Does not belong here: anything of this project, which that
environment does not have, so nothing of it is imported.
"""

import argparse
import contextlib
import gzip
import importlib
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Python puts a script's folder first, and this one holds modules of ours with the packages' names (clip).
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
# The reference is float32 on a CPU; hpsv2 would take a GPU by itself, and compute in float16 there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Everything is given as files; a library that would rather ask a hub is told not to.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

PACKAGES = ("hpsv2", "image-reward", "transformers", "timm", "clip-anytorch", "torch", "torchvision", "pillow")
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
ARCHITECTURE = "ViT-H-14"
"""The name under which hpsv2 asks for its model and its tokenizer, whatever the architecture is."""
SECONDS_BETWEEN_LOOKS = 1.0
CHARACTERS_OF_AN_ERROR = 500


# --- importing the packages ------------------------------------------------------------------------------------------


def import_torchvision() -> None:
    """Import torchvision although its compiled operators may not load.

    The wheel at hand may be built for CUDA, and its library does not load next to a torch for CPUs. torchvision then still
    describes its operators `nms` and `qnms` to torch, which fails because nobody has declared them: so they are declared.
    Neither is used by the reward models; their resizes are torch's and Pillow's.
    """
    import torch

    if "torchvision" in sys.modules:
        return
    # clip imports it, and the pinned setuptools still has it.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("torchvision is not installed")
    try:
        torch.ops.load_library(Path(spec.submodule_search_locations[0]) / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # A library's declarations go with the object.
        _kept.append(library)
    importlib.import_module("torchvision")


_kept: list[Any] = []


@contextlib.contextmanager
def replaced(where: Any, **by: Any) -> Iterator[None]:
    """Put other objects in the place of attributes while the block runs."""
    before = {name: getattr(where, name) for name in by}
    try:
        for name, value in by.items():
            setattr(where, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(where, name, value)


@contextlib.contextmanager
def bpe_of_clip() -> Iterator[None]:
    """Let who opens hpsv2's byte-pair vocabulary read the one of the package clip: hpsv2's wheel lacks the file."""
    import clip

    there = Path(clip.__file__).parent / BPE_FILE
    opened = gzip.open

    def open_there(file: Any, *arguments: Any, **options: Any) -> Any:
        is_missing = isinstance(file, str | os.PathLike) and Path(file).name == BPE_FILE and not Path(file).exists()
        return opened(there if is_missing else file, *arguments, **options)

    with replaced(gzip, open=open_there):
        yield


def import_hpsv2() -> Any:
    """Return the module hpsv2.img_score."""
    import_torchvision()
    try:
        importlib.import_module("turtle")
    except ImportError:
        # An import that an editor once added: `from turtle import forward`, which needs tkinter and is not used.
        stub = types.ModuleType("turtle")
        stub.forward = None  # type: ignore[attr-defined]
        sys.modules["turtle"] = stub
    # Without a folder that exists, score() makes one in the home folder.
    os.environ["HPS_ROOT"] = tempfile.gettempdir()
    with bpe_of_clip():
        return importlib.import_module("hpsv2.img_score")


def import_image_reward() -> Any:
    """Return the module ImageReward."""
    import_torchvision()
    return importlib.import_module("ImageReward")


# --- the models ------------------------------------------------------------------------------------------------------


def read_json(path: str | None) -> Any:
    """Return a JSON file's content, None without a file."""
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


class HPSv2:
    """hpsv2.img_score.score."""

    def __init__(self, specification: dict[str, Any]) -> None:
        self._module = import_hpsv2()
        self._checkpoint = specification["checkpoint"]
        self._reload = bool(specification.get("reload"))
        model, preprocess = build_hpsv2(read_json(specification.get("architecture")))
        # score() builds a model of LAION's weights, which it would fetch, unless there is one here already.
        self._module.model_dict.update(model=model, preprocess_val=preprocess)
        self._is_loaded = False
        self.image_size = model.visual.image_size
        self.image_size = self.image_size[0] if isinstance(self.image_size, tuple) else self.image_size
        self.parameters = sum(p.numel() for p in model.parameters())

    def score(self, image: Any, prompt: str) -> float:
        """Return the package's score."""
        with contextlib.nullcontext() if self._reload else self._loaded_once():
            (score,) = self._module.score(image, prompt, cp=self._checkpoint)
        return float(score)

    @contextlib.contextmanager
    def _loaded_once(self) -> Iterator[None]:
        """Let the package's first call read the checkpoint and fill the model, and every later one find that done."""
        import torch

        model = self._module.model_dict["model"]
        fill = model.load_state_dict

        def fill_first(state: dict[str, Any]) -> Any:
            result = fill(state)
            self._is_loaded = True
            return result

        if self._is_loaded:
            nothing = {"state_dict": None}
            with replaced(torch, load=lambda *_, **__: nothing), replaced(model, load_state_dict=lambda state: None):
                yield
        else:
            with replaced(model, load_state_dict=fill_first):
                yield


def build_hpsv2(architecture: dict[str, Any] | None, precision: str = "amp") -> tuple[Any, Any]:
    """Return hpsv2's model with random weights and its preprocessing, both as img_score.initialize_model makes them."""
    open_clip = importlib.import_module("hpsv2.src.open_clip")
    if architecture is not None:
        with tempfile.TemporaryDirectory() as folder:
            # A later file of the same name takes the place of the package's own.
            (Path(folder) / f"{ARCHITECTURE}.json").write_text(json.dumps(architecture.get("model_cfg", architecture)))
            open_clip.add_model_config(folder)
    model, _, preprocess = open_clip.create_model_and_transforms(
        ARCHITECTURE, None, precision=precision, device="cpu", light_augmentation=True, output_dict=True
    )
    return model, preprocess


class ImageReward:
    """ImageReward.load and the score of what it returns."""

    image_size = 224

    def __init__(self, specification: dict[str, Any]) -> None:
        package = import_image_reward()
        med_config = specification["med_config"]
        sizes = read_json(med_config), read_json(specification.get("vit_config"))
        with image_reward_of(*sizes), tokenizer_of(specification["vocabulary"]):
            self._model = package.load(name=specification["checkpoint"], device="cpu", med_config=med_config)
        # It loads with strict=False and says nothing.
        require_all(specification["checkpoint"], self._model)
        self.parameters = sum(p.numel() for p in self._model.parameters())

    def score(self, image: Any, prompt: str) -> float:
        """Return the package's score."""
        return float(self._model.score(prompt, image))


@contextlib.contextmanager
def image_reward_of(med_config: dict[str, Any], vit_config: dict[str, Any] | None) -> Iterator[None]:
    """Build models of another size than the published one, which the package hard-codes."""
    pretrain, reward = _module("models.BLIP.blip_pretrain"), _module("ImageReward")
    vision_transformer, mlp = _module("models.BLIP.vit").VisionTransformer, reward.MLP

    def create_vit(*arguments: Any) -> tuple[Any, int]:
        assert vit_config is not None
        return vision_transformer(**vit_config), vit_config["embed_dim"]

    with (
        replaced(pretrain, create_vit=create_vit if vit_config else pretrain.create_vit),
        replaced(reward, MLP=lambda inputs: mlp(med_config["hidden_size"])),
    ):
        yield


@contextlib.contextmanager
def tokenizer_of(vocabulary: str) -> Iterator[None]:
    """Let the package's init_tokenizer, which has no option for it, take its BertTokenizer from a file's folder."""
    blip = _module("models.BLIP.blip")
    published, folder = blip.BertTokenizer, str(Path(vocabulary).parent)
    with replaced(
        blip, BertTokenizer=types.SimpleNamespace(from_pretrained=lambda _: published.from_pretrained(folder))
    ):
        yield


def _module(name: str) -> Any:
    """Return a submodule of ImageReward; as attributes they are hidden by classes of the same names."""
    return sys.modules[f"ImageReward.{name}"]


def require_all(checkpoint: str, model: Any, part: str = "") -> None:
    """Refuse a checkpoint that leaves parameters of a model as they were initialised."""
    import torch

    found = torch.load(checkpoint, map_location="meta", mmap=True)
    missing = sorted(name for name, _ in model.named_parameters() if name.startswith(part) and name not in found)
    if missing:
        raise ValueError(f"{checkpoint}: {len(missing)} tensors are missing, such as {missing[:3]}")


class Aesthetic:
    """ImageReward.load_score("Aesthetic") and the score of what it returns, on a CLIP that is given."""

    image_size = 224

    def __init__(self, specification: dict[str, Any]) -> None:
        package = import_image_reward()
        checkpoint = specification["checkpoint"]
        # Both would be fetched.
        with (
            replaced(_module("utils"), _download=lambda *_: checkpoint),
            replaced(_module("models.AestheticScore").clip, load=lambda *_, **__: load_clip(specification["backbone"])),
        ):
            self._model = package.load_score("Aesthetic", device="cpu", download_root=tempfile.gettempdir())
        require_all(checkpoint, self._model.mlp)
        self.parameters = sum(p.numel() for p in self._model.parameters())

    def score(self, image: Any, prompt: str) -> float:
        """Return the package's score; the prompt has no part in it."""
        if not isinstance(image, str):
            # It opens what it is given.
            encoded = io.BytesIO()
            image.save(encoded, "PNG")
            image = encoded
        return float(self._model.score(prompt, image))


def load_clip(folder: str) -> tuple[Any, Any]:
    """Return what clip.load returns: the image tower of a transformers folder as OpenAI's model, and its preprocessing.

    clip.load itself reads OpenAI's own file only, and rounds the weights to float16.
    """
    import torch
    from clip import clip, model
    from safetensors.torch import load_file

    config = read_json(str(Path(folder) / "config.json"))
    weights = Path(folder) / "model.safetensors"
    pickled = weights.with_name("pytorch_model.bin")
    state = load_file(weights) if weights.exists() else torch.load(pickled, map_location="cpu")
    vision = config["vision_config"]
    width, size, layers = vision["hidden_size"], vision["image_size"], vision["num_hidden_layers"]
    if vision["num_attention_heads"] != max(1, width // 64) or vision["hidden_act"] != "quick_gelu":
        raise ValueError(f"{folder}: OpenAI's CLIP has heads of 64 and quick GELU, found {vision}")
    # The text tower is not asked: as small as possible.
    made = model.CLIP(config["projection_dim"], size, layers, width, vision["patch_size"], 4, 4, 4, 1, 1)
    state = {k.removeprefix("vision_model."): v.float() for k, v in state.items()}
    tower = {
        "class_embedding": state["embeddings.class_embedding"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "proj": state["visual_projection.weight"].T,
    }
    names = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for i in range(layers):
        theirs, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        names |= {f"{block}.ln_{j}": f"{theirs}.layer_norm{j}" for j in (1, 2)}
        names |= {f"{block}.mlp.c_fc": f"{theirs}.mlp.fc1", f"{block}.mlp.c_proj": f"{theirs}.mlp.fc2"}
        names[f"{block}.attn.out_proj"] = f"{theirs}.self_attn.out_proj"
        for what in ("weight", "bias"):
            parts = [state[f"{theirs}.self_attn.{letter}_proj.{what}"] for letter in "qkv"]
            tower[f"{block}.attn.in_proj_{what}"] = torch.cat(parts)
    tower |= {f"{a}.{what}": state[f"{b}.{what}"] for a, b in names.items() for what in ("weight", "bias")}
    made.visual.load_state_dict(tower)
    return made.float().eval(), clip._transform(size)


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "hpsv2": HPSv2,
    "imagereward": ImageReward,
    "aesthetic": Aesthetic,
}


def load(specification: dict[str, Any]) -> Any:
    """Return the loaded model of a specification."""
    if specification.get("dtype", "float32") != "float32":
        raise ValueError(f"dtype {specification['dtype']!r}: the packages are the reference in float32 alone")
    from PIL import Image

    # Whoever gives the images has decided what is too large.
    Image.MAX_IMAGE_PIXELS = None
    return KINDS[specification["kind"]](specification)


def facts(model: Any) -> dict[str, Any]:
    """Return the model's size and the packages' versions."""
    return {"image_size": model.image_size, "parameters": model.parameters, "versions": versions()}


def versions() -> dict[str, str]:
    """Return the versions of what computes a score."""
    return {name: version(name) for name in PACKAGES}


def score_items(model: Any, items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a result per item; what the package raises on one item costs that item alone."""
    from PIL import Image

    results: list[dict[str, Any]] = []
    for item in items:
        started = time.perf_counter()
        try:
            image: Any = item["image"]
            if item.get("convert"):
                with Image.open(image) as opened:
                    image = opened.convert(item["convert"])
            score = model.score(image, item["prompt"])
        except Exception as error:
            # The packages raise whatever the library raises in which an odd image ends.
            results.append({"error": say(error)})
        else:
            results.append({"score": score, "seconds": time.perf_counter() - started})
    return results


def say(error: Exception) -> str:
    """Return an exception in one bounded line; torch lists every tensor that does not fit."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:CHARACTERS_OF_AN_ERROR]}"


# --- random checkpoints ----------------------------------------------------------------------------------------------


def make_checkpoint(job: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint of random weights in the published format, its names those of the packages' own modules.

    A job has `kind` (hpsv2 | imagereward), `folder`, `seed`, and for another size than the published one `architecture` or
    `med_config` and `vit_config`, each the content of the JSON file, which is written too. The byte-pair vocabulary comes
    from the package clip, the one of imagereward is small and our own. Returns what lies there now: {"files": [...]}.
    """
    import torch

    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(job["seed"])
    if job["kind"] == "hpsv2":
        import_hpsv2()
        architecture = job.get("architecture")
        model, _ = build_hpsv2(architecture)
        randomise(model)
        torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
        if architecture is not None:
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}, indent=1))
        write_clip_vocabulary(folder)
    elif job["kind"] == "imagereward":
        import_image_reward()
        med_config = folder / "med_config.json"
        med_config.write_text(json.dumps(job.get("med_config") or MED_CONFIG, indent=1))
        if job.get("vit_config"):
            (folder / "vit_config.json").write_text(json.dumps(job["vit_config"], indent=1))
        write_bert_vocabulary(folder / "vocab.txt", read_json(str(med_config))["vocab_size"])
        sizes = read_json(str(med_config)), job.get("vit_config")
        with image_reward_of(*sizes), tokenizer_of(str(folder / "vocab.txt")):
            model = _module("ImageReward").ImageReward(str(med_config))
        randomise(model)
        # As initialised, the five small matrices of the head, one after the other, make every score the same.
        widen(model)
        torch.save(model.state_dict(), folder / "ImageReward.pt")
    else:
        raise ValueError(f"kind {job['kind']!r}: expected hpsv2 or imagereward")
    return {"files": sorted(p.name for p in folder.iterdir())}


MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
"""The published med_config.json."""


def randomise(model: Any) -> None:
    """Move every bias and every weight of a norm off 0 and 1, so that none can be lost or exchanged unnoticed."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def widen(model: Any) -> None:
    """Give linear layers weights that keep the size of what goes through, so that scores tell pictures and prompts apart."""
    import torch

    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.normal_(std=1 / math.sqrt(layer.in_features))


def write_clip_vocabulary(folder: Path) -> None:
    """Write the vocabulary of the package clip as the files that model hubs have: vocab.json and merges.txt."""
    import clip
    from clip.simple_tokenizer import SimpleTokenizer

    tokens = SimpleTokenizer().encoder
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    lines = gzip.decompress((Path(clip.__file__).parent / BPE_FILE).read_bytes()).decode().split("\n")
    # What is behind these lines, CLIP does not use: 256 bytes in two forms and two special tokens make up the rest.
    merges = lines[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def write_bert_vocabulary(path: Path, vocab_size: int) -> None:
    """Write a WordPiece vocabulary that leaves two of `vocab_size` ids for the tokens that BLIP adds."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = ["a", "of", "the", "and", "in", "on", "with", "cat", "dog", "red", "robot", "castle", "river", "painting"]
    endings = ["##s", "##ed", "##ing", "##er", "##le", "##ht"]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters if c.isalnum())]
    entries += [w for w in [*words, *endings] if w not in entries]
    left = vocab_size - 2 - len(entries)
    if left < 0:
        raise ValueError(f"vocab_size {vocab_size}: at least {len(entries) + 2} are needed")
    path.write_text("\n".join([*entries, *(f"[unused{i}]" for i in range(left))]) + "\n", encoding="utf-8")


# --- commands --------------------------------------------------------------------------------------------------------


def take_stdout() -> Any:
    """Return the real stdout and send to stderr whatever else is printed: the packages print as they load."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    sys.stdout.flush()
    os.dup2(2, 1)
    return channel


def leave_with(parent: int) -> None:
    """End this process when the process `parent` ends, also in the middle of a batch.

    The end of stdin alone comes late, and not at all while another child of that process holds the pipe; the kernel's
    death signal comes early: when the thread ends that started this process.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def serve(channel: Any) -> None:
    """Answer requests until stdin ends."""
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                model = load(request["load"])
                reply: dict[str, Any] = {"facts": facts(model)}
            else:
                reply = {"results": score_items(model, request["items"])}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": say(error)}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


def check() -> dict[str, str]:
    """Import the packages and return their versions."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:
        # Nothing but the named packages is installed, so a build for CUDA finds none of its libraries.
        raise SystemExit(
            f"torch cannot be loaded ({error}): if pip took its build for CUDA, remove {sys.prefix}, show pip one for CPUs "
            f"(PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL) and run `make reference` again"
        ) from error
    import_hpsv2()
    import_image_reward()
    return versions()


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    scoring = commands.add_parser("score")
    scoring.add_argument("job", type=Path)
    scoring.add_argument("result", type=Path)
    serving = commands.add_parser("serve")
    serving.add_argument("parent", type=int, help="process id")
    making = commands.add_parser("make-checkpoint")
    making.add_argument("job", type=Path)
    arguments = parser.parse_args()
    channel = take_stdout()
    if arguments.command == "serve":
        leave_with(arguments.parent)
        serve(channel)
        # Taking torch and the packages down in order takes seconds and does nothing.
        os._exit(0)
    elif arguments.command == "score":
        job = json.loads(arguments.job.read_text(encoding="utf-8"))
        model = load(job["model"])
        result = {"facts": facts(model), "results": score_items(model, job["items"])}
        arguments.result.write_text(json.dumps(result), encoding="utf-8")
    elif arguments.command == "make-checkpoint":
        channel.write(json.dumps(make_checkpoint(json.loads(arguments.job.read_text(encoding="utf-8")))) + "\n")
    else:
        channel.write(json.dumps(check()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
