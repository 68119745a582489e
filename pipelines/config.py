"""The one configuration: a TOML file checked by pydantic; without a file, the embedded small world.

Belongs here: what people choose, with its default and unit. Does not belong here: constants of a method.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

import fsspec
import fsspec.config
import pydantic

from pipelines.world.raw import WorldConfig

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights"
HOME_VARIABLE = "POLYPHONY_HOME"
CONFIG_VARIABLE = "POLYPHONY_CONFIG"


class ConfigError(ValueError):
    """The configuration file is wrong; the message names the option, what was found and what is expected."""


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


RESERVED = ("consensus", "ensemble", "fidelity", "human", "majority", "random_scorer", "raw_sum", "zscore_sum")
"""Names of judges and voters of our own, which no scorer may have."""
Layout = Literal["auto", "pickapic", "pickapic_webdataset", "hpd", "hpdv3", "rapidata", "pairs"]


class SourceConfig(_Model):
    """One raw dataset."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9_]+$", description="name in the tables and in shard keys")
    layout: Layout = pydantic.Field("auto", description="layout of the files; auto looks at their columns")
    location: str = pydantic.Field(description="folder of the raw files: a path or an fsspec URL")
    family: str = pydantic.Field(
        "",
        description="whose annotators and image names these are, shared by releases of one dataset: 'pickapic' or 'hpd' by "
        "layout, else the name; a dataset of your own in one of those layouts needs a family of its own",
    )
    split: Literal["train", "validation", "test"] | None = pydantic.Field(
        None, description="split of files whose names tell none; absent: the catalogue draws one by prompt"
    )
    records_per_shard: int = pydantic.Field(50_000, ge=1, description="JSON records per shard")
    storage: Literal["auto", "copy", "reference"] | None = pydantic.Field(
        None, description="images.storage for this source alone"
    )


class ImagesConfig(_Model):
    """How image bytes are kept."""

    storage: Literal["auto", "copy", "reference"] = pydantic.Field(
        "auto",
        description="copy: bytes in the store; reference: where they lie, and sha256; auto: by the source's size",
    )
    reference_above_gb: float = pydantic.Field(10.0, ge=0, description="auto refers to sources larger than this, GB")


class LimitsConfig(_Model):
    """What is too large to be an image of a preference dataset; such images get the status too_large."""

    max_image_bytes: int = pydantic.Field(64_000_000, ge=1, description="encoded bytes of one image")
    max_image_pixels: int = pydantic.Field(64_000_000, ge=1, description="width x height")
    max_image_side: int = pydantic.Field(16_384, ge=1, description="pixels of the longer side")


class SplitsConfig(_Model):
    """Shares of prompts for which no source names a split; drawn by the prompt's id, so that they never move."""

    validation: float = pydantic.Field(0.05, ge=0, le=1, description="share of prompts")
    test: float = pydantic.Field(0.05, ge=0, le=1, description="share of prompts")


class ScorerConfig(_Model):
    """One reward model."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9_.]+$", description="name of the score column and of the asset")
    kind: Literal["pickscore", "clip", "hpsv2", "hpsv2.1", "imagereward", "aesthetic", "imported", "custom"] = (
        pydantic.Field(description="formula, checkpoint format and preprocessing")
    )
    checkpoint: str = pydantic.Field("", description="local folder or file, or hub id; imported: the file of scores")
    processor: str = pydantic.Field(
        "", description="folder or hub id of the tokenizer (and PickScore's preprocessing); empty: the checkpoint's"
    )
    backbone: str = pydantic.Field(
        "", description="aesthetic: folder or hub id of the CLIP model whose features it reads"
    )
    batch_size: int = pydantic.Field(256, ge=1, description="pictures per forward; halved where memory runs out")
    precision: Literal["float32", "bfloat16"] = pydantic.Field(
        "float32", description="of the matrix products; the parity with the original packages holds in float32"
    )
    backend: Literal["native", "reference"] = pydantic.Field(
        "native",
        description="reference: the original package's own code (hpsv2, image-reward), slow; see `make reference`",
    )
    reference_python: str = pydantic.Field(
        str(ROOT / ".venv-reference" / "bin" / "python"),
        description="backend reference: interpreter of the environment that `make reference` installs",
    )
    function: str = pydantic.Field("", description="custom: 'module:function'")
    options: dict[str, Any] = pydantic.Field(default_factory=dict, description="custom: arguments of that function")
    revision: str = pydantic.Field("", description="custom, imported: the revision that its makers give it")
    family: str = pydantic.Field("", description="imported: family of the source whose image names the file uses")
    score_column: str = pydantic.Field("score", description="imported: column that holds the score")

    @pydantic.model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> ScorerConfig:
        needed = "function" if self.kind == "custom" else "checkpoint"
        if not getattr(self, needed):
            raise ValueError(f"scorer {self.name!r}: kind {self.kind!r} needs {needed}, found none")
        if self.backend == "reference" and self.kind not in ("hpsv2", "hpsv2.1", "imagereward"):
            raise ValueError(
                f"scorer {self.name!r}: backend 'reference' runs hpsv2, hpsv2.1 and imagereward; kind {self.kind!r} has none"
            )
        return self


class BackboneConfig(_Model):
    """The text-to-image model that is trained."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9_.-]+$", description="name in the tables")
    family: Literal["tiny", "sd15", "sd21", "sdxl"] = pydantic.Field(description="what kind of pipeline it is")
    checkpoint: str = pydantic.Field(description="local diffusers folder or hub id")
    resolution: int = pydantic.Field(512, ge=8, description="pixels, square")
    vae: str = pydantic.Field(
        "", description="folder or hub id of another autoencoder, e.g. SDXL's fp16-safe one; empty: the checkpoint's"
    )


class PromptSuiteConfig(_Model):
    """A file of prompts to evaluate on."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9_.-]+$", description="name for evaluation.suite")
    file: str = pydantic.Field(
        description=".txt (one per line), .csv, .tsv, .json or .parquet: a path or an fsspec URL"
    )
    column: str = pydantic.Field("prompt", description="column or field that holds the prompt")


class ScoringConfig(_Model):
    """How reward models run."""

    device: str = pydantic.Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    workers: int = pydantic.Field(1, ge=0, description="processes, each with its own models; 0: one per GPU")
    threads: int = pydantic.Field(0, ge=0, description="threads that decode, per process; 0: the cores' share")
    part_seconds: float = pydantic.Field(30.0, ge=0, description="seconds of work that a killed run loses at most")


class LabelsConfig(_Model):
    """Choices about labels."""

    tie_policy: Literal["drop", "human", "tie_breaker", "keep_order"] = pydantic.Field(
        "human", description="what decides a pair on which the scorers' votes are even"
    )
    tie_breaker: str = pydantic.Field("", description="scorer that decides under tie_policy 'tie_breaker'")
    human_votes: bool = pydantic.Field(
        False, description="the humans' majority is one voter more in the consensus, beside the scorers"
    )
    seed: int = pydantic.Field(0, description="of the draw of consensus.random_scorer_label_0")
    smpo_scorer: str = pydantic.Field(
        "", description="scorer of p_smpo; empty: the first of kind pickscore, else the first"
    )
    smpo_constants: Literal["data", "published"] = pydantic.Field(
        "data", description="range in SmPO's form: the store's own scores', or PickScore's cosines as published"
    )
    generator_term: bool = pydantic.Field(
        False, description="the ensemble also learns which generators people like (it learns their bias)"
    )
    em: bool = pydantic.Field(False, description="fill minority.em_probability, a second opinion by joint EM")
    groups_file: str = pydantic.Field(
        "",
        description="parquet file (annotator_id, group) of groups of your own, a path or fsspec URL; empty: they are found",
    )


class ValidationConfig(_Model):
    """What is looked at while a run trains."""

    every: int = pydantic.Field(20, ge=0, description="optimiser steps between validations; 0: none")
    pairs: int = pydantic.Field(128, ge=1, description="held-out pairs: the first ones by id")
    draws: int = pydantic.Field(4, ge=1, description="fixed (timestep, noise) draws per pair")
    prompts: int = pydantic.Field(8, ge=0, description="held-out prompts that are sampled, one picture each; 0: none")
    scorer: str = pydantic.Field("", description="scorer of the samples' median score; empty: the first not imported")
    best_by: str = pydantic.Field(
        "implicit_accuracy_human",
        description="metric that chooses the best checkpoint: implicit_accuracy_<labels>, loss_<labels> (human, consensus, "
        "minority), median_score",
    )


class TrainingConfig(_Model):
    """Numbers a person varies without making another recipe."""

    recipes: tuple[str, ...] = pydantic.Field(
        ("diffusion_dpo", "adaptive_dpo", "smpo", "balanced_dpo"), description="recipes of trainers/recipes"
    )
    backbone: str = pydantic.Field("", description="backbone that is trained; empty: the first")
    device: str = pydantic.Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    seed: int = pydantic.Field(0, description="seed of order, timesteps and noise")
    steps: int | None = pydantic.Field(None, ge=1, description="optimiser steps; the recipe's own if absent")
    batch_size: int | None = pydantic.Field(None, ge=1, description="pairs per step; the recipe's own if absent")
    micro_batch: int | None = pydantic.Field(
        None, ge=1, description="pairs per forward of a process; absent: the step's pairs over the processes"
    )
    processes: int = pydantic.Field(1, ge=1, description="training processes on this machine; one GPU each")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = pydantic.Field(
        "auto", description="of matrix products, weights stay float32; auto: bf16 on a GPU that has it, else fp32"
    )
    activation_checkpointing: bool = pydantic.Field(False, description="recompute activations: less memory, more time")
    compile: Literal["none", "transformers", "blocks"] = pydantic.Field(
        "none",
        description="torch.compile every transformer block, or residual blocks too: faster after one to three minutes, but "
        "policy and reference then differ by rounding from the first step on",
    )
    checkpoint_every: int = pydantic.Field(10, ge=1, description="optimiser steps between checkpoints")
    loss_limit: float = pydantic.Field(100.0, gt=0, description="a mean loss above it stops the run")
    log_pairs: bool = pydantic.Field(False, description="write margin, weight and c, v, u per pair and step")
    export: Literal["last", "best"] = pydantic.Field(
        "last", description="the weights that become the run's model: those of the last step or the best validation's"
    )
    validation: ValidationConfig = ValidationConfig()


class EvaluationConfig(_Model):
    """How models are sampled and compared."""

    suite: str = pydantic.Field("", description="prompt suite to sample; empty: the store's held-out prompts")
    prompts: int = pydantic.Field(120, ge=2, description="prompts: the first held-out ones by id, or of the suite")
    seeds: int = pydantic.Field(4, ge=1, description="samples per prompt")
    steps: int = pydantic.Field(20, ge=1, description="DDIM steps")
    guidance: float = pydantic.Field(3.0, ge=1.0, description="classifier-free guidance scale")
    bootstrap: int = pydantic.Field(2_000, ge=100, description="bootstrap resamples of prompts")


class ChecksConfig(_Model):
    """When a check warns."""

    sample_pairs: int = pydantic.Field(
        2_000, ge=1, description="pairs of the frozen sample on which drift is measured; drawn once and kept"
    )
    accuracy_points: float = pydantic.Field(
        2.0, ge=0, description="points by which a scorer's accuracy on the frozen sample may move between revisions"
    )
    consensus_share: float = pydantic.Field(
        0.01, ge=0, le=1, description="share of the sample's consensus labels that may change between revisions"
    )
    calibration_error: float = pydantic.Field(0.05, ge=0, le=1, description="expected calibration error of a scorer")
    excluded_share: float = pydantic.Field(0.1, ge=0, le=1, description="share of pairs that are excluded")


class AutomationConfig(_Model):
    """What happens without a person. Schedules and the alert sensors are off until they are switched on in the UI."""

    rescore_cron: str = pydantic.Field("0 3 * * 0", description="when the re-scoring schedule looks for changed shards")
    relabel_cron: str = pydantic.Field(
        "0 9 * * 0", description="when the relabelling schedule makes every label table again that is not current"
    )
    maintenance_cron: str = pydantic.Field("0 5 * * 0", description="when the maintenance schedule prunes")
    timezone: str = pydantic.Field("UTC", description="time zone of these")
    ingest_new_shards: bool = pydantic.Field(
        False, description="the sensor that registers new source shards also starts their ingestion"
    )
    owners: dict[str, str] = pydantic.Field(
        default_factory=dict,
        description="who owns the assets of a group (ingest, scores, labels, caches, training, evaluation, store): an e-mail "
        "address or 'team:<name>'; absent: 'team:<group>'",
    )
    webhook: str = pydantic.Field(
        "", description="URL that failures and overdue tables are posted to, as JSON with a field 'text'"
    )
    pages_url: str = pydantic.Field(
        "",
        description="URL below which the store's folder `pairs` is served, for links in the UI; empty: paths are shown",
    )
    fresh_days: float = pydantic.Field(8.0, ge=0.001, description="days after which a published table is overdue")
    keep_run_days: float = pydantic.Field(
        90.0, gt=0, description="days that finished runs, their events and logs are kept; a table's last run stays"
    )
    keep_revisions: int = pydantic.Field(
        2, ge=1, description="revisions of a scorer's scores that are kept, the active one among them"
    )


class Config(_Model):
    """Everything. Relative paths are relative to the working directory."""

    home: str = pydantic.Field(description="folder of raw data, runs and, by default, the store")
    store: str = pydantic.Field("", description="folder of the tables; <home>/store if empty")
    world: WorldConfig | None = pydantic.Field(
        None, description="parameters of the small world, if it is to be written"
    )
    sources: tuple[SourceConfig, ...] = pydantic.Field(min_length=1)
    scorers: tuple[ScorerConfig, ...] = pydantic.Field(min_length=1)
    prompt_suites: tuple[PromptSuiteConfig, ...] = ()
    filesystems: dict[str, dict[str, Any]] = pydantic.Field(
        default_factory=dict,
        description="fsspec options by protocol, e.g. [filesystems.s3] endpoint_url; credentials belong in the environment",
    )
    scoring: ScoringConfig = ScoringConfig()
    backbones: tuple[BackboneConfig, ...] = pydantic.Field(min_length=1)
    images: ImagesConfig = ImagesConfig()
    limits: LimitsConfig = LimitsConfig()
    splits: SplitsConfig = SplitsConfig()
    labels: LabelsConfig = LabelsConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checks: ChecksConfig = ChecksConfig()
    automation: AutomationConfig = AutomationConfig()

    @pydantic.model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        for what in ("sources", "scorers", "backbones", "prompt_suites"):
            names = [part.name for part in getattr(self, what)]
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: names repeat: {names}")
        if reserved := {s.name for s in self.scorers} & set(RESERVED):
            raise ValueError(f"scorers: the names {sorted(reserved)} are taken by columns of our own; choose others")
        if self.labels.tie_policy == "tie_breaker" and self.labels.tie_breaker not in {s.name for s in self.scorers}:
            raise ValueError(f"labels.tie_breaker: {self.labels.tie_breaker!r} is none of the scorers")
        if self.labels.smpo_scorer and self.labels.smpo_scorer not in {s.name for s in self.scorers}:
            raise ValueError(f"labels.smpo_scorer: {self.labels.smpo_scorer!r} is none of the scorers")
        if "all" in {s.name for s in self.sources}:
            raise ValueError("sources: the name 'all' is that of all sources together; choose another")
        if "://" in self.home:
            raise ValueError(
                f"home: {self.home!r} is a URL; it holds runs and logs, set it to a local folder, and store to the URL"
            )
        if self.training.backbone and self.training.backbone not in {b.name for b in self.backbones}:
            raise ValueError(f"training.backbone: {self.training.backbone!r} is none of the backbones")
        if self.evaluation.suite and self.evaluation.suite not in {s.name for s in self.prompt_suites}:
            raise ValueError(f"evaluation.suite: {self.evaluation.suite!r} is none of the prompt_suites")
        if self.splits.validation + self.splits.test > 1:
            raise ValueError("splits: the shares of validation and test add up to more than 1")
        return self

    @property
    def store_location(self) -> str:
        """Return where the tables lie."""
        return self.store or str(Path(self.home) / "store")

    @property
    def runs_folder(self) -> Path:
        """Return where checkpoints, logs and exported models lie."""
        return Path(self.home) / "runs"

    @property
    def world_folder(self) -> Path:
        """Return where the small world's raw files lie."""
        return Path(self.home) / "world"

    @property
    def backbone(self) -> BackboneConfig:
        """Return the backbone that is trained."""
        name = self.training.backbone or self.backbones[0].name
        return next(b for b in self.backbones if b.name == name)

    def suite(self) -> PromptSuiteConfig | None:
        """Return the prompt suite of the evaluation, or None for the held-out prompts."""
        return next((s for s in self.prompt_suites if s.name == self.evaluation.suite), None)

    def source(self, name: str) -> SourceConfig:
        """Return the source of that name."""
        return next(s for s in self.sources if s.name == name)


def default_home() -> Path:
    """Return $POLYPHONY_HOME, or `.polyphony` in the repository."""
    return Path(os.environ.get(HOME_VARIABLE) or ROOT / ".polyphony")


def small_world(home: Path | None = None, world: WorldConfig | None = None) -> Config:
    """Return the embedded default: the small world, its tiny reward models and its tiny backbone."""
    home = (home or default_home()).resolve()
    raw = home / "world"
    return Config(
        home=str(home),
        world=world or WorldConfig(),
        sources=(
            SourceConfig(name="pickapic", layout="pickapic", location=str(raw / "pickapic")),
            SourceConfig(name="hpd", layout="hpd", location=str(raw / "hpdv2"), records_per_shard=300),
        ),
        scorers=(
            ScorerConfig(name="pickscore", kind="pickscore", checkpoint=str(WEIGHTS / "tiny-pickscore")),
            ScorerConfig(name="clip", kind="clip", checkpoint=str(WEIGHTS / "tiny-clip")),
            ScorerConfig(name="hpsv2", kind="hpsv2.1", checkpoint=str(WEIGHTS / "tiny-hpsv2")),
            ScorerConfig(name="imagereward", kind="imagereward", checkpoint=str(WEIGHTS / "tiny-imagereward")),
            ScorerConfig(
                name="aesthetic",
                kind="aesthetic",
                checkpoint=str(WEIGHTS / "tiny-aesthetic"),
                backbone=str(WEIGHTS / "tiny-clip"),
            ),
        ),
        backbones=(BackboneConfig(name="tiny", family="tiny", checkpoint=str(WEIGHTS / "tiny-sd"), resolution=32),),
        # Where `make ui` serves them.
        automation=AutomationConfig(pages_url="http://127.0.0.1:3001"),
    )


def load(path: str | Path | None = None) -> Config:
    """Return the configuration in `path`, else in $POLYPHONY_CONFIG, else the small world.

    Raises:
        ConfigError: the file is missing, is not TOML, or an option is unknown or wrong.
    """
    chosen = path or os.environ.get(CONFIG_VARIABLE)
    if not chosen:
        return small_world()
    try:
        # A launcher hands a run's options to the processes it starts as JSON.
        read = json.loads if Path(chosen).suffix == ".json" else tomllib.loads
        options = read(Path(chosen).read_text())
    except OSError as error:
        raise ConfigError(
            f"{chosen}: {error.strerror}; name an existing TOML file, or none for the small world"
        ) from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{chosen}: not valid {'JSON' if Path(chosen).suffix == '.json' else 'TOML'}: {error}"
        ) from error
    options.setdefault("home", str(default_home()))
    config = _checked(options, str(chosen))
    use_filesystems(config)
    return config


def changed(config: Config, **parts: dict[str, Any]) -> Config:
    """Return the configuration with other options in some of its parts, e.g. labels = {"tie_policy": "drop"}.

    Raises:
        ConfigError: an option is unknown or wrong.
    """
    if not any(parts.values()):
        return config
    options = config.model_dump()
    for part, values in parts.items():
        options[part] = {**options[part], **values}
    return _checked(options, "options of this run")


def _checked(options: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(options)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(p) for p in e['loc']) or 'file'}: {e['msg']} (found {e.get('input')!r})"
            for e in error.errors()
        )
        raise ConfigError(f"{where}: {problems}") from error


def use_filesystems(config: Config) -> None:
    """Make whoever opens a URL from here on in this process, in whatever library, use the configuration's options."""
    for protocol, given in config.filesystems.items():
        fsspec.config.conf[protocol] = {**fsspec.config.conf.get(protocol, {}), **given}
