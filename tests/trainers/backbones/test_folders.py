import json
import re
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from pipelines.config import ConfigError
from pipelines.hub import CheckpointError
from trainers import backbones
from trainers.backbones import folders

LOADED = {
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "model_index.json",
}
LOADED_XL = {f.replace("encoder/", "encoder_2/").replace("tokenizer/", "tokenizer_2/") for f in LOADED} | LOADED
NOT_LOADED = {
    ".gitattributes",
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "sd_xl_base_1.0.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.onnx",
    "text_encoder_2/model.onnx_data",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/openvino_model.bin",
    "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/config.json",
}


def edited(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def copy_of(config_of, tmp_path):
    """Return the configuration of a case whose folder the test may damage."""

    def copy(case, **changes):
        config = config_of(case)
        shutil.copytree(config.checkpoint, tmp_path / case)
        return config.model_copy(update={"checkpoint": str(tmp_path / case), **changes})

    return copy


def test_only_what_is_loaded_is_fetched_from_a_hub():
    assert set(filter_repo_objects(LOADED_XL | NOT_LOADED, allow_patterns=list(folders.wanted()))) == LOADED_XL


def test_shards_and_their_index_are_fetched_but_not_those_of_a_variant():
    name = "unet/diffusion_pytorch_model"
    kept = {f"{name}-00001-of-00002.safetensors", f"{name}.safetensors.index.json"}
    left = {f"{name}.fp16-00001-of-00002.safetensors", f"{name}.fp16.safetensors.index.json"}
    assert set(filter_repo_objects(kept | left, allow_patterns=list(folders.wanted()))) == kept


@pytest.mark.parametrize("case", ["tiny", "sd15", "sd21-base", "sd21", "sdxl"])
def test_every_case_is_found_under_its_own_family(config_of, case):
    config = config_of(case)
    assert str(backbones.resolve(config)) == config.checkpoint
    assert backbones.load(config).digest == backbones.digest(config)


@pytest.mark.parametrize(
    ("case", "family", "found", "advice"),
    [
        (
            "sdxl",
            "sd15",
            "says StableDiffusionXLPipeline",
            "expected StableDiffusionPipeline; family is one of ['sdxl']",
        ),
        ("sdxl", "tiny", "says StableDiffusionXLPipeline", "expected StableDiffusionPipeline"),
        ("sd15", "sdxl", "says StableDiffusionPipeline", "family is one of ['sd15', 'sd21', 'tiny']"),
        ("sd21", "sd15", "says prediction_type 'v_prediction'", "expected one of ['epsilon']"),
    ],
)
def test_another_family_is_refused(config_of, case, family, found, advice):
    config = config_of(case).model_copy(update={"family": family})
    for function in (backbones.resolve, backbones.digest, backbones.load):
        with pytest.raises(ConfigError, match=r"backbones\.family") as refusal:
            function(config)
        assert found in str(refusal.value)
        assert advice in str(refusal.value)
        assert config.checkpoint in str(refusal.value)


@pytest.mark.parametrize(("width", "owner"), [(768, "sd15"), (1024, "sd21"), (2048, "sdxl")])
def test_the_published_widths_belong_to_one_family_each(copy_of, width, owner):
    config = copy_of("sd21-base")
    edited(backbones.resolve(config) / "unet" / "config.json", cross_attention_dim=width)
    for family in ("tiny", "sd15", "sd21"):
        other = config.model_copy(update={"family": family})
        if family == owner:
            backbones.resolve(other)
        else:
            with pytest.raises(ConfigError, match=f"cross_attention_dim {width}; expected family '{owner}'"):
                backbones.resolve(other)


def test_a_pipeline_of_no_known_kind_is_refused_with_those_that_are_known(copy_of):
    config = copy_of("sd15")
    edited(backbones.resolve(config) / folders.INDEX, _class_name="FluxPipeline")
    with pytest.raises(ConfigError, match=r"says FluxPipeline.*'StableDiffusionPipeline', 'StableDiffusionXLPipeline'"):
        backbones.load(config)


def test_a_part_of_another_kind_is_refused(copy_of):
    config = copy_of("sdxl")
    edited(backbones.resolve(config) / folders.INDEX, text_encoder_2=["transformers", "T5EncoderModel"])
    with pytest.raises(
        ConfigError, match="says T5EncoderModel of text_encoder_2; expected CLIPTextModelWithProjection"
    ):
        backbones.load(config)


def test_an_autoencoder_that_normalises_by_channel_is_refused(copy_of):
    config = copy_of("sdxl")
    edited(backbones.resolve(config) / "vae" / "config.json", latents_mean=[0.0] * 4)
    with pytest.raises(ConfigError, match="latents_mean"):
        backbones.load(config)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "tokenizer_2/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(copy_of, file):
    config = copy_of("sdxl")
    missing = backbones.resolve(config) / file
    missing.unlink()
    for function in (backbones.resolve, backbones.digest, backbones.load):
        with pytest.raises(CheckpointError, match=f"backbone 'sdxl': {re.escape(str(missing))} is missing"):
            function(config)


def test_a_missing_weight_is_named_with_the_variants_that_lie_there(copy_of):
    config = copy_of("sd15")
    weights = backbones.resolve(config) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(CheckpointError, match=r"beside it lie .*fp16.*without a variant"):
        backbones.resolve(config)


def test_a_missing_folder_is_named(config_of, tmp_path):
    config = config_of("tiny").model_copy(update={"checkpoint": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match=r"nowhere/model_index.json is missing.*python -m trainers.world_models"):
        backbones.digest(config)


def test_damaged_json_is_named(copy_of):
    config = copy_of("sd15")
    (backbones.resolve(config) / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"scheduler_config.json is no valid JSON"):
        backbones.load(config)


def test_the_digest_is_of_what_is_loaded(copy_of):
    config = copy_of("sd15")
    folder, before = backbones.resolve(config), backbones.digest(config)
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"unused")
    (folder / "README.md").write_text("unused")
    assert backbones.digest(config) == before
    assert backbones.digest(config.model_copy(update={"resolution": 32})) != before
    edited(folder / "scheduler" / "scheduler_config.json", beta_end=0.013)
    assert backbones.digest(config) != before


def test_another_autoencoder_stands_in_for_the_checkpoints(config_of, make_pipeline, tmp_path):
    config = config_of("sdxl")
    same = config.model_copy(update={"vae": f"{config.checkpoint}/vae"})
    assert backbones.digest(same) == backbones.digest(config)
    other = config.model_copy(update={"vae": str(make_pipeline("sdxl", tmp_path / "other", seed=5) / "vae")})
    assert backbones.digest(other) != backbones.digest(config)
    gone = config.model_copy(update={"vae": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match=r"gone/config\.json is missing"):
        backbones.load(gone)


def test_weights_may_lie_in_shards(copy_of):
    config = copy_of("sd15")
    folder = backbones.resolve(config) / "unet"
    whole = backbones.load(config).unet
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="300KB")
    shards = sorted(folder.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    again = backbones.load(config).unet
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    before = backbones.digest(config)
    shards[1].write_bytes(shards[1].read_bytes() + b" ")
    assert backbones.digest(config) != before
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1]} is missing"):
        backbones.load(config)


def test_pickled_weights_are_read_where_there_are_no_others(copy_of):
    config = copy_of("sd15")
    folder = backbones.resolve(config) / "unet"
    whole = backbones.load(config).unet
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    whole.save_pretrained(folder, safe_serialization=False)
    again = backbones.load(config).unet
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
