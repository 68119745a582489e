import numpy as np
import pytest

from pipelines.world import people, raw, scene

ATTRIBUTES = ("shape", "colour", "size", "place")


def one_scene(**values):
    default = {
        "shape": 0,
        "colour": 0,
        "size": 1,
        "place": 4,
        "brightness": 0.5,
        "saturation": 1.0,
        "warmth": 0.0,
        "x": 16.0,
        "y": 16.0,
        "radius": 8.5,
    }
    return scene.Scenes(**{k: np.array([v]) for k, v in {**default, **values}.items()})


@pytest.fixture(scope="module")
def renders():
    """500 scenes of all renderers' styles, their pictures with grain, and what was asked for."""
    rng = np.random.default_rng(5)
    pool = scene.all_prompts()
    wanted = [scene.parse_prompt(pool[i]) for i in rng.integers(0, len(pool), 500)]
    style = rng.integers(0, len(people.RENDERERS), 500)
    scenes = people.draw(wanted, style, rng)
    grain = np.array([people.RENDERERS[i].grain for i in style])
    return scenes, scene.render(scenes, grain=grain, rng=rng), wanted


def test_the_reader_gets_all_four_attributes_right_on_98_percent_of_renders(renders):
    scenes, pictures, _ = renders
    read = scene.read_attributes(pictures)
    right = np.all([getattr(read, a) == getattr(scenes, a) for a in ATTRIBUTES], axis=0)
    assert right.mean() >= 0.98


def test_the_reader_survives_the_jpeg_encoding_of_the_raw_files(renders):
    from pipelines.images import decode_rgb

    scenes, pictures, _ = renders
    decoded = np.stack([np.asarray(decode_rgb(raw.jpeg_bytes(p, 95))) for p in pictures])
    read = scene.read_attributes(decoded)
    right = np.all([getattr(read, a) == getattr(scenes, a) for a in ATTRIBUTES], axis=0)
    assert right.mean() >= 0.98


def test_the_reader_measures_what_taste_is_about(renders):
    scenes, pictures, _ = renders
    read = scene.read_attributes(pictures)
    assert np.abs(read.brightness - scenes.brightness).mean() < 0.01
    assert np.abs(read.saturation - scenes.saturation).mean() < 0.02
    assert np.abs(read.warmth - scenes.warmth).mean() < 0.1


def test_reading_does_not_depend_on_the_other_pictures_of_the_batch(renders):
    _, pictures, _ = renders
    together, alone = scene.read_attributes(pictures[:300]), scene.read_attributes(pictures[299:300])
    for name in ATTRIBUTES:
        assert getattr(together, name)[299] == getattr(alone, name)[0]
    assert together.brightness[299] == pytest.approx(alone.brightness[0], abs=1e-6)


def test_a_picture_without_an_object_has_no_attributes():
    flat = np.full((1, 32, 32, 3), 128, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    for picture in (flat, noise):
        read = scene.read_attributes(picture)
        assert [int(getattr(read, a)[0]) for a in ATTRIBUTES] == [scene.NONE] * 4


@pytest.mark.parametrize(
    "pictures", [np.zeros((1, 32, 32, 3), float), np.zeros((1, 64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)]
)
def test_pictures_of_another_type_or_size_are_refused(pictures):
    with pytest.raises(ValueError, match="expected uint8"):
        scene.read_attributes(pictures)


def test_every_prompt_of_the_grammar_parses_to_what_wrote_it():
    for prefix in scene.PREFIXES:
        for wanted in (
            scene.Wanted(0, 1),
            scene.Wanted(3, size=0),
            scene.Wanted(2, place=4),
            scene.Wanted(1, 4, 1, 2),
        ):
            assert scene.parse_prompt(wanted.text(prefix)) == wanted
    for prompt in scene.all_prompts():
        wanted = scene.parse_prompt(prompt)
        assert 2 <= len(wanted.fixed()) <= 4
        assert prompt in {wanted.text(prefix) for prefix in scene.PREFIXES}


def test_prompts_do_not_repeat_and_read_as_english():
    prompts = scene.all_prompts()
    assert len(set(prompts)) == len(prompts) == 4 * 4 * (6 * 3 * 6 - 1)
    assert {"a small red circle, left", "a triangle, left", "a drawing of a large cross"} <= set(prompts)


@pytest.mark.parametrize("prompt", ["a dog", "a red", "a circle square", "a red blue circle", ""])
def test_a_prompt_outside_the_grammar_is_refused(prompt):
    with pytest.raises(ValueError, match="its own grammar"):
        scene.parse_prompt(prompt)


def test_the_background_is_its_brightness_tinted_by_its_warmth():
    corner = scene.render(one_scene(brightness=0.5, warmth=0.5))[0, 0, 0]
    # 0.5 +- 0.1 * 0.5 on red and blue, times 255.
    assert corner.tolist() == [140, 128, 115]


def test_the_object_has_its_hue_at_the_fixed_value():
    middle = scene.render(one_scene(colour=0, saturation=1.0))[0, 16, 16]
    assert middle.tolist() == [166, 0, 0]
    blue = scene.render(one_scene(colour=3, saturation=0.6))[0, 16, 16]
    # Hue 220: value 0.65, chroma 0.39, red at 0.26, green at 0.26 + 0.39 * 20/60.
    assert blue.tolist() == [66, 99, 166]


def test_a_circle_covers_the_area_of_a_circle():
    picture = scene.render(one_scene(brightness=0.95, radius=8.5))[0, ..., 1].astype(float)
    covered = (1 - picture / picture[0, 0]).sum()
    assert covered == pytest.approx(np.pi * 8.5**2, rel=0.01)


def test_a_sampled_scene_has_what_the_prompt_fixes_and_leaves_the_rest_open():
    wanted = [scene.Wanted(2, colour=1)] * 400
    scenes = scene.sample_scenes(wanted, np.random.default_rng(0))
    assert (scenes.shape == 2).all()
    assert (scenes.colour == 1).all()
    assert set(scenes.size) == {0, 1}
    assert set(scenes.place) == {0, 1, 2, 3, 4}
    low, high = scene.BRIGHTNESS_RANGE
    assert (low <= scenes.brightness).all()
    assert (scenes.brightness <= high).all()
    assert scenes.brightness.std() > 0.1 * (high - low)


def test_an_error_rate_of_one_makes_every_fixed_attribute_wrong():
    wanted = [scene.Wanted(2, 1, 0, 3)] * 200
    scenes = scene.sample_scenes(wanted, np.random.default_rng(0), error_rate=1.0)
    assert scene.fidelity(scenes, wanted).tolist() == [0.0] * 200
    assert scene.fidelity(scene.sample_scenes(wanted, np.random.default_rng(0)), wanted).tolist() == [1.0] * 200


def test_fidelity_is_the_share_of_fixed_attributes():
    scenes = one_scene(shape=0, colour=3, size=1, place=2)
    cases = [
        (scene.Wanted(0, 3), 1.0),
        (scene.Wanted(0, 1), 0.5),
        (scene.Wanted(1, 3, 1), 2 / 3),
        (scene.Wanted(0, 3, 0, 1), 0.5),
        (scene.Wanted(1, 0, 0, 0), 0.0),
    ]
    for wanted, share in cases:
        assert scene.fidelity(scenes, [wanted])[0] == pytest.approx(share)


def test_an_attribute_that_was_not_found_counts_as_wrong():
    scenes = one_scene(shape=scene.NONE, colour=scene.NONE, size=scene.NONE, place=scene.NONE)
    assert scene.fidelity(scenes, [scene.Wanted(0, 3)])[0] == 0.0
