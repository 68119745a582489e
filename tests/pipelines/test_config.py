import pytest

from pipelines import config
from pipelines.sources import detect
from pipelines.world.raw import WorldConfig

GOOD = """
home = "/data/here"
[[sources]]
name = "pap"
layout = "pickapic"
location = "/raw/pap"
[[scorers]]
name = "clip"
kind = "clip"
checkpoint = "/models/clip"
[[backbones]]
name = "tiny"
family = "tiny"
checkpoint = "/models/tiny"
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        file = tmp_path / "polyphony.toml"
        file.write_text(text)
        return file

    return to_file


def test_without_a_file_the_small_world_is_configured(monkeypatch, tmp_path):
    monkeypatch.delenv(config.CONFIG_VARIABLE, raising=False)
    monkeypatch.setenv(config.HOME_VARIABLE, str(tmp_path))
    loaded = config.load()
    assert loaded.world == WorldConfig()
    assert {s.layout for s in loaded.sources} == {"pickapic", "hpd"}
    assert loaded.store_location == str(tmp_path / "store")
    assert all(s.location.startswith(str(loaded.world_folder)) for s in loaded.sources)


def test_the_environment_names_a_file_and_an_argument_overrides_it(monkeypatch, write, tmp_path):
    monkeypatch.setenv(config.CONFIG_VARIABLE, str(tmp_path / "absent.toml"))
    with pytest.raises(config.ConfigError, match=r"absent\.toml"):
        config.load()
    assert config.load(write(GOOD)).home == "/data/here"


def test_a_file_gives_its_values_and_leaves_the_rest_at_defaults(write):
    loaded = config.load(write(GOOD))
    assert loaded.store_location == "/data/here/store"
    assert loaded.world is None
    assert detect.resolved(loaded.source("pap")).family == "pickapic"
    assert loaded.source("pap").storage is None
    assert loaded.limits.max_image_pixels == 64_000_000
    assert loaded.labels.tie_policy == "human"


def test_the_parameters_of_the_small_world_can_be_set(write):
    loaded = config.load(write(GOOD + "[world]\nseed = 3\nrows_per_shard = 9\n"))
    assert loaded.world == WorldConfig(seed=3, rows_per_shard=9)


def test_a_family_can_be_shared_by_sources_of_different_names(write):
    loaded = config.load(write(GOOD.replace('layout = "pickapic"', 'layout = "pickapic"\nfamily = "mine"')))
    assert detect.resolved(loaded.source("pap")).family == "mine"


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        *[("pickapic", "pickapic"), ("pickapic_webdataset", "pickapic"), ("hpd", "hpd"), ("hpdv3", "hpdv3")],
        *[("rapidata", "pap"), ("pairs", "pap")],
    ],
)
def test_a_family_that_is_not_named_is_the_layouts_or_else_the_sources_own(write, layout, family):
    loaded = config.load(write(GOOD.replace('"pickapic"', f'"{layout}"')))
    assert detect.resolved(loaded.source("pap")).family == family


def test_a_layout_that_is_not_named_is_looked_for_in_the_files(write, tiny_world):
    text = GOOD.replace('layout = "pickapic"\n', "")
    loaded = config.load(write(text)).source("pap")
    assert loaded.layout == "auto"
    for folder, layout in (("pickapic", "pickapic"), ("hpdv2", "hpd")):
        found = detect.resolved(config.load(write(text.replace("/raw/pap", str(tiny_world / folder)))).source("pap"))
        assert (found.layout, found.family) == (layout, layout)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (GOOD.replace("layout", "layoutt"), ["sources.0.layoutt", "sources.0.layout"]),
        (GOOD.replace('"pickapic"', '"parquet"'), ["sources.0.layout", "'parquet'", "pickapic"]),
        (GOOD + "[labels]\ntie_policy = 'coin'\n", ["labels.tie_policy", "'coin'", "keep_order"]),
        (GOOD + "[labels]\ntie_policy = 'tie_breaker'\ntie_breaker = 'hps'\n", ["tie_breaker", "'hps'"]),
        (GOOD + "[training]\nsteps = 0\n", ["training.steps", "found 0"]),
        (GOOD + "[world]\nsed = 3\n", ["world.sed"]),
        (GOOD.replace('name = "clip"', 'name = "a/b"'), ["scorers.0.name", "a/b"]),
        (GOOD.split("[[scorers]]")[0], ["scorers"]),
    ],
)
def test_a_wrong_option_is_named_with_what_was_found(write, text, names):
    file = write(text)
    with pytest.raises(config.ConfigError) as error:
        config.load(file)
    assert str(file) in str(error.value)
    assert [n for n in names if n not in str(error.value)] == []


def test_two_scorers_of_one_name_are_refused(write):
    again = '[[scorers]]\nname = "clip"\nkind = "pickscore"\ncheckpoint = "/models/other"\n'
    with pytest.raises(config.ConfigError, match="names repeat"):
        config.load(write(GOOD + again))


@pytest.mark.parametrize("content", [b"home = ", b"\xff\xfe\x00"])
def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path, content):
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(config.ConfigError, match=r"broken\.toml: not valid TOML"):
        config.load(file)


def test_a_folder_in_place_of_the_file_is_refused_by_name(tmp_path):
    with pytest.raises(config.ConfigError, match=str(tmp_path)):
        config.load(tmp_path)


@pytest.mark.parametrize("name", config.RESERVED)
def test_a_scorer_named_like_a_judge_of_our_own_is_refused(write, name):
    again = f'[[scorers]]\nname = "{name}"\nkind = "pickscore"\ncheckpoint = "/models/other"\n'
    with pytest.raises(config.ConfigError, match=f"{name}.*taken"):
        config.load(write(GOOD + again))


def test_a_source_named_like_all_of_them_is_refused(write):
    again = '[[sources]]\nname = "all"\nlocation = "/data/all"\n'
    with pytest.raises(config.ConfigError, match="sources: the name 'all'"):
        config.load(write(GOOD + again))
