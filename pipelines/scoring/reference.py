"""The original packages as scorers: a process of their own environment loads the model once and answers batch by batch.

    prepare        keeps the encoded picture
    encode_images  writes a batch's pictures to files, as the packages read them
    compare        asks the process, which calls `hpsv2.img_score.score` or `ImageReward.score` on each pair

For who wants the original code path, and for the tests that hold our own scorers to it. Belongs here: that process.
Does not belong here: what makes the packages run (`reference_driver`, which runs in that process).
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image

from pipelines.config import ConfigError, ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.images import UndecodableImage
from pipelines.scoring import checkpoints, reference_driver
from pipelines.scoring.checkpoints import ScoringError
from pipelines.scoring.pictures import Picture
from pipelines.scoring.scorer import Scorer

DRIVER = Path(reference_driver.__file__)
_PACKAGES = {"hpsv2": "hpsv2", "hpsv2.1": "hpsv2", "imagereward": "image-reward"}
_CONVERT = {"hpsv2": "RGB", "hpsv2.1": "RGB", "imagereward": None}
"""hpsv2 makes every image RGB but RGBA, on which it fails; image-reward resizes in the image's own mode, and takes it."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_TAIL = 2000
_SECONDS_TO_END = 5.0


class ReferencePackageError(ScoringError):
    """The process of the original packages failed or died; the message has what it said."""


class ReferenceProcess:
    """A process that has loaded one of the packages' models; `facts` says how large it is and the packages' versions."""

    def __init__(self, python: str | Path, specification: Mapping[str, Any]) -> None:
        """python: interpreter of the packages' environment. specification: see reference_driver.

        Raises:
            CheckpointError: there is no such environment.
            ReferencePackageError: the packages or the model cannot be loaded.
        """
        if not Path(python).exists():
            raise CheckpointError(
                f"{python} is missing, the interpreter of the original packages' environment; run `make reference`, or set "
                f"the scorer's reference_python, or its backend to 'native'"
            )
        # A file, because a pipe that nobody reads fills up and stops who writes.
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            # Isolated, so that our own environment's variables do not put our packages before theirs.
            [str(python), "-I", str(DRIVER), "serve", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            # An interrupt at the terminal is ours to answer, perhaps after the batch.
            start_new_session=True,
        )
        self.close = weakref.finalize(self, _end, self._process, self._said)
        try:
            self.facts: dict[str, Any] = self._ask({"load": dict(specification)})["facts"]
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a result per item: `score` and `seconds`, or `error`; see reference_driver.

        Raises:
            ReferencePackageError: the process died.
        """
        return self._ask({"items": [dict(item) for item in items]})["results"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            # It died before, and a closed one has closed its pipes; what it said comes below.
            pass
        if not answer:
            raise ReferencePackageError(f"the process of the original packages ended{self._how()}")
        reply = json.loads(answer)
        if "error" in reply:
            raise ReferencePackageError(
                f"the original packages failed: {reply['error']}; if one cannot be imported, run `make reference` again"
            )
        return reply

    def _how(self) -> str:
        if self._said.closed:
            return ": it was closed"
        try:
            status = f" with status {self._process.wait(_SECONDS_TO_END)}"
        except subprocess.TimeoutExpired:
            status = ""
        self._said.seek(0)
        text = self._said.read().decode(errors="replace").strip()
        return f"{status}; the last it said: {text[-_TAIL:] or 'nothing'}"


def _end(process: subprocess.Popen[str], said: IO[bytes]) -> None:
    """Close the pipes, at which it ends, and wait for it; kill one that is in the middle of something."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                # What it was not told any more cannot be flushed.
                continue
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    said.close()


@dataclass(frozen=True)
class _Written:
    """A batch's pictures as files, gone with the object."""

    folder: tempfile.TemporaryDirectory[str]
    paths: list[str]


class ReferenceScorer(Scorer):
    """hpsv2 or image-reward, in float32 on the CPU whatever the device; the process lives as long as the scorer."""

    def __init__(self, config: ScorerConfig, files: Mapping[str, Path]) -> None:
        super().__init__(config, "cpu")
        try:
            self.process = ReferenceProcess(config.reference_python, specify(config, files))
        except (CheckpointError, ReferencePackageError) as error:
            raise CheckpointError(f"scorer {config.name!r}, backend 'reference': {error}") from error
        self._package = f"{_PACKAGES[self.kind]} {self.process.facts['versions'][_PACKAGES[self.kind]]}"
        self._size = int(self.process.facts["image_size"])
        self.preprocessing = f"encoded:{_PACKAGES[self.kind]}:{self._size}"

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a reader of the scores must know: which versions computed them."""
        return {**super().facts, "backend": "reference", "versions": self.process.facts["versions"]}

    def prepare(self, picture: Picture) -> bytes:
        """Return the encoded picture.

        Raises:
            UndecodableImage: the package is known to fail on its size.
        """
        if _PACKAGES[self.kind] == "hpsv2" and (why := hpsv2_refuses(*picture.image.size, self._size)):
            raise UndecodableImage(f"{self._package} fails on it: {why}; backend 'native' scores it")
        return picture.data if picture.data is not None else _encode(picture.image)

    def stack(self, prepared: Sequence[bytes]) -> list[bytes]:
        """Return them as they are."""
        return list(prepared)

    def encode_images(self, batch: Sequence[bytes]) -> _Written:
        """Write the pictures as files; the packages compute an image's features anew for every prompt."""
        folder = tempfile.TemporaryDirectory(prefix="polyphony-reference-")
        paths = []
        for i, data in enumerate(batch):
            file = Path(folder.name) / str(i)
            file.write_bytes(data)
            paths.append(str(file))
        return _Written(folder, paths)

    def compare(self, features: _Written, rows: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Return the packages' scores, [M].

        Raises:
            ReferencePackageError: the package failed on a picture, or the process died.
        """
        items = [
            {"image": features.paths[row], "prompt": prompt, "convert": _CONVERT[self.kind]}
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        results = self.process.score(items)
        for result, prompt in zip(results, prompts, strict=True):
            if "error" in result:
                raise ReferencePackageError(
                    f"scorer {self.name!r}: {self._package} failed on an image with the prompt {prompt[:200]!r}: "
                    f"{result['error']}; backend 'native' is meant to score what the package cannot"
                )
        return torch.tensor([result["score"] for result in results], dtype=torch.float32)


def hpsv2_refuses(width: int, height: int, size: int = 224) -> str:
    """Return why hpsv2 fails on an image of this size, '' if it does not: two faults of its resize."""
    longest, shortest = max(width, height), min(width, height)
    if longest == size != shortest:
        return f"{width}x{height} is not square and its longer side is {size} already, so it is not padded"
    if round(shortest * (size / float(longest))) == 0:
        return f"{width}x{height} has no pixels left on one side when the other is {size}"
    return ""


def specify(config: ScorerConfig, files: Mapping[str, Path]) -> dict[str, Any]:
    """Return what reference_driver loads for a scorer whose files are these, by name."""
    if _PACKAGES[config.kind] == "hpsv2":
        named = {"architecture": "open_clip_config.json"}
        checkpoint = next(path for name, path in files.items() if name.endswith(".pt"))
    else:
        named = {"med_config": "med_config.json", "vit_config": "vit_config.json", "vocabulary": "vocab.txt"}
        checkpoint = files["ImageReward.pt"]
    kind = "hpsv2" if _PACKAGES[config.kind] == "hpsv2" else config.kind
    given = {option: str(files[name]) for option, name in named.items() if name in files}
    return {"kind": kind, "checkpoint": str(checkpoint), "dtype": "float32", **given}


def _encode(image: Image.Image) -> bytes:
    """Return an image without loss: PNG, or TIFF where PNG lacks its mode."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if image.mode in _PNG_MODES else "TIFF")
    return buffer.getvalue()


def create(config: ScorerConfig, device: str = "cpu") -> ReferenceScorer:
    """Start the process of a scorer's package; `device` has no part in it.

    Raises:
        ConfigError: another precision than float32.
        CheckpointError: the environment or a file is missing, or the packages cannot load it.
    """
    if config.precision != "float32":
        raise ConfigError(
            f"scorer {config.name!r}: backend 'reference' computes in float32 alone, found precision "
            f"{config.precision!r}; remove the option, or set backend to 'native'"
        )
    return ReferenceScorer(config, checkpoints.resolve(config))
