import json
import shutil

import diffusers
import pytest
import torch
from safetensors import safe_open

from pipelines.hub import CheckpointError
from trainers import backbones
from trainers.backbones import exports
from trainers.backbones.adapters import adapters_off, has_adapters
from trainers.recipes import FullWeights, LoRA

RULE = LoRA(rank=2, alpha=6)
SAMPLED = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}


def plain(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def trained(backbone_of, question, train, tmp_path_factory):
    """Return (UNet in train mode, its prediction, exported folder) of a case and weights; read only."""
    made = {}

    def model(case, weights):
        if (case, weights.name) not in made:
            backbone, folder = backbone_of(case), tmp_path_factory.mktemp("exports") / case / weights.name
            unet = train(backbone, backbone.trainable(weights, None, seed=0), question(backbone))
            backbone.export(unet, folder)
            with torch.no_grad():
                made[case, weights.name] = unet, backbone.predict(unet, *question(backbone)), folder
        return made[case, weights.name]

    return model


@pytest.mark.parametrize("weights", [FullWeights(), RULE], ids=["full", "lora"])
def test_a_model_that_is_loaded_again_predicts_as_the_policy_did(backbone, case, weights, trained, question):
    _, expected, folder = trained(case, weights)
    asked = question(backbone)
    assert exports.kind(folder) == weights.name
    unet = backbone.load_unet(folder)
    torch.testing.assert_close(backbone.predict(unet, *asked), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, backbone.predict(backbone.unet, *asked), atol=1e-3)
    assert not unet.training
    assert not has_adapters(unet)
    assert not any(p.requires_grad for p in unet.parameters())
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


def test_a_full_export_is_a_pipeline_of_plain_diffusers(backbone, case, trained, question):
    _, expected, folder = trained(case, FullWeights())
    pipeline = plain(folder)
    assert type(pipeline) is backbone.pipeline_class
    torch.testing.assert_close(backbone.predict(pipeline.unet, *question(backbone)), expected, atol=1e-5, rtol=1e-5)
    assert pipeline(["a small red circle"], **SAMPLED).images.shape == (1, 16, 16, 3)


def test_every_other_part_of_a_full_export_is_a_copy_byte_for_byte(backbone, case, trained):
    _, _, folder = trained(case, FullWeights())
    before, after = files(backbone.folder), files(folder)
    assert after.keys() == before.keys()
    assert {n for n in after if after[n] != before[n]} <= {n for n in after if n.startswith(("unet/", "model_index"))}
    assert json.loads(after["model_index.json"]) == json.loads(before["model_index.json"])


def test_a_lora_is_loaded_by_plain_diffusers_onto_the_base(backbone, case, trained, question):
    _, expected, folder = trained(case, RULE)
    assert set(files(folder)) == {exports.LORA_FILE, exports.BASE_FILE}
    pipeline = plain(backbone.folder)
    pipeline.load_lora_weights(folder, weight_name=exports.LORA_FILE)
    torch.testing.assert_close(backbone.predict(pipeline.unet, *question(backbone)), expected, atol=1e-5, rtol=1e-5)
    assert pipeline(["a small red circle"], **SAMPLED).images.shape == (1, 16, 16, 3)


def test_a_lora_keeps_its_rank_and_alpha_and_names_its_base(backbone_of, trained):
    backbone, (_, _, folder) = backbone_of("sdxl"), trained("sdxl", RULE)
    with safe_open(folder / exports.LORA_FILE, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.r"], told["unet.lora_alpha"]) == (2, 6)
    base = json.loads((folder / exports.BASE_FILE).read_text())
    assert base["checkpoint"] == backbone.config.checkpoint
    assert base["digest"] == backbone.digest
    assert base["start"] is None


@pytest.mark.parametrize("weights", [FullWeights(), RULE], ids=["full", "lora"])
@pytest.mark.parametrize("earlier", [FullWeights(), RULE], ids=["from-full", "from-lora"])
def test_training_goes_on_from_an_export(backbone_of, trained, question, train, tmp_path, earlier, weights):
    backbone, (_, expected, start) = backbone_of("sdxl"), trained("sdxl", earlier)
    asked = question(backbone)
    unet = backbone.trainable(weights, start, seed=1)
    torch.testing.assert_close(backbone.predict(unet, *asked), expected, atol=1e-5, rtol=1e-5)
    train(backbone, unet, asked)
    if weights is RULE:
        with adapters_off(unet):
            torch.testing.assert_close(backbone.predict(unet, *asked), expected, atol=1e-5, rtol=1e-5)
    backbone.export(unet, tmp_path / "next" / "model")
    again = backbone.predict(backbone.load_unet(tmp_path / "next" / "model"), *asked)
    torch.testing.assert_close(again, backbone.predict(unet, *asked), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(again, expected, atol=1e-3)


def test_a_lora_on_another_export_finds_it_again_where_both_have_moved(backbone_of, trained, question, tmp_path):
    backbone, (_, expected, start) = backbone_of("sd15"), trained("sd15", FullWeights())
    home = tmp_path / "home"
    shutil.copytree(start, home / "runs" / "sft" / "model")
    unet = backbone.trainable(RULE, home / "runs" / "sft" / "model", seed=1)
    backbone.export(unet, home / "runs" / "dpo" / "model")
    moved = home.rename(tmp_path / "moved") / "runs"
    asked = question(backbone)
    torch.testing.assert_close(
        backbone.predict(backbone.load_unet(moved / "dpo" / "model"), *asked), expected, atol=1e-5, rtol=1e-5
    )
    backbone.export(backbone.unet, moved / "sft" / "model")
    with pytest.raises(CheckpointError, match="holds other weights by now"):
        backbone.load_unet(moved / "dpo" / "model")
    shutil.rmtree(moved / "sft")
    with pytest.raises(CheckpointError, match=r"sft/model/unet/config\.json is missing"):
        backbone.load_unet(moved / "dpo" / "model")


def test_a_lora_of_another_base_is_refused(backbone_of, trained, make_pipeline, tmp_path):
    _, _, folder = trained("sd15", RULE)
    config = backbone_of("sd15").config
    other = config.model_copy(update={"checkpoint": str(make_pipeline("sd15", tmp_path / "other", seed=7))})
    with pytest.raises(CheckpointError, match=r"base\.json: trained on the UNet .*set backbones\.checkpoint"):
        backbones.load(other).load_unet(folder)
    # Resolution and autoencoder are no matter of the UNet's weights.
    backbones.load(config.model_copy(update={"resolution": 32})).load_unet(folder)


@pytest.mark.parametrize(
    ("weights", "file"),
    [
        (FullWeights(), "unet/config.json"),
        (FullWeights(), "unet/diffusion_pytorch_model.safetensors"),
        (RULE, "base.json"),
    ],
)
def test_an_export_that_is_not_whole_is_none_and_its_missing_file_is_named(
    backbone_of, trained, tmp_path, weights, file
):
    folder = shutil.copytree(trained("sd15", weights)[2], tmp_path / "model")
    (folder / file).unlink()
    assert exports.kind(folder) is None
    with pytest.raises(CheckpointError, match=f"{folder / file} is missing"):
        backbone_of("sd15").load_unet(folder)
    assert exports.kind(tmp_path / "nowhere") is None


def test_a_lora_file_without_a_unets_adapters_is_refused(backbone_of, trained, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(trained("sd15", RULE)[2], tmp_path / "model")
    save_file({"text_encoder.a.lora_A.weight": torch.ones(1, 1)}, folder / exports.LORA_FILE)
    with pytest.raises(CheckpointError, match="holds no weights of a UNet's adapters"):
        backbone_of("sd15").load_unet(folder)


def test_an_export_takes_the_place_of_an_older_one_and_an_interrupted_one_does_not(
    backbone_of, question, train, tmp_path, monkeypatch
):
    backbone = backbone_of("sd15")
    backbone.export(backbone.unet, tmp_path / "model")
    first = files(tmp_path / "model")
    unet = train(backbone, backbone.trainable(FullWeights(), None, seed=0), question(backbone))
    with monkeypatch.context() as patch:
        patch.setattr(unet, "save_pretrained", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backbone.export(unet, tmp_path / "model")
    assert files(tmp_path / "model") == first
    backbone.export(unet, tmp_path / "model")
    assert files(tmp_path / "model") != first
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_parts_that_training_does_not_know_are_left_out_and_plain_diffusers_still_loads_it(config_of, tmp_path):
    folder = shutil.copytree(config_of("sd15").checkpoint, tmp_path / "sd15")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"unused")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"unused")
    backbone = backbones.load(config_of("sd15").model_copy(update={"checkpoint": str(folder)}))
    backbone.export(backbone.unet, tmp_path / "model")
    assert not list((tmp_path / "model").rglob("*.fp16.*"))
    assert plain(tmp_path / "model").safety_checker is None


def test_an_index_may_leave_out_optional_parts(config_of, tmp_path):
    folder = shutil.copytree(config_of("sdxl").checkpoint, tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    for optional in ("feature_extractor", "image_encoder", "force_zeros_for_empty_prompt"):
        index.pop(optional)
    (folder / "model_index.json").write_text(json.dumps(index))
    backbone = backbones.load(config_of("sdxl").model_copy(update={"checkpoint": str(folder)}))
    backbone.export(backbone.unet, tmp_path / "model")
    assert plain(tmp_path / "model")(["a circle"], **SAMPLED).images.shape == (1, 16, 16, 3)


def test_another_autoencoder_caches_samples_and_is_exported(backbone_of, make_pipeline, tmp_path):
    config = backbone_of("sdxl").config
    vae = make_pipeline("sdxl", tmp_path / "other", seed=5) / "vae"
    backbone = backbones.load(config.model_copy(update={"vae": str(vae)}))
    expected = diffusers.AutoencoderKL.from_pretrained(vae)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(backbone.encode_images(pixels)[0], expected.encode(pixels).latent_dist.mean)
    assert not torch.allclose(backbone.encode_images(pixels)[0], backbone_of("sdxl").encode_images(pixels)[0])
    assert backbone.pipeline(backbone.unet).vae is backbone.vae
    backbone.export(backbone.unet, tmp_path / "model")
    assert files(tmp_path / "model" / "vae") == files(vae)
    assert plain(tmp_path / "model")(["a circle"], **SAMPLED).images.shape == (1, 16, 16, 3)
