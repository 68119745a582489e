import datetime as dt
import itertools
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from pipelines import images, schemas
from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring import batches, checkpoints, custom, scorer
from pipelines.scoring.custom import CustomScorerError
from pipelines.scoring.pictures import Picture

_numbers = itertools.count()
BRIGHT = """
    import numpy as np

    def bright(device, factor=1.0):
        def judge(images, prompts):
            return [factor * np.asarray(i).mean() + len(p) for i, p in zip(images, prompts, strict=True)]
        return judge
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of its own name where Python finds it; return the name."""
    monkeypatch.syspath_prepend(str(tmp_path / "code"))

    def write(source, name=None):
        name = name or f"judge_{next(_numbers)}"
        file = tmp_path / "code" / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
        return name

    yield write
    for name in [n for n in sys.modules if n.startswith(("judge_", "judges_of_"))]:
        del sys.modules[name]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((8, 8), (20, 9), (5, 30))]
    return [Picture(Image.fromarray(a)) for a in arrays]


def scorer_of(function, **options):
    return ScorerConfig(**{"name": "mine", "kind": "custom", "function": function, **options})


def judge(loaded, pictures, prompts):
    return loaded.score([loaded.prepare(p) for p in pictures], prompts)


def expected(picture, prompt, factor=1.0):
    return factor * np.asarray(picture.rgb).mean() + len(prompt)


# --- the contract ----------------------------------------------------------------------------------------------------


def test_a_function_of_ones_own_judges_every_image_with_its_prompt(module, pictures):
    loaded = scorer.load(scorer_of(f"{module(BRIGHT)}:bright", options={"factor": 2.0}, batch_size=2))
    prompts = ["a", "bb", "ccc"]
    wanted = [expected(p, t, 2.0) for p, t in zip(pictures, prompts, strict=True)]
    found = judge(loaded, pictures, prompts)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(wanted)
    pairs = [(2, "x"), (0, "yy"), (2, "zzz"), (2, "x")]
    values = loaded.score_pairs([loaded.prepare(p) for p in pictures], pairs)
    assert values.tolist() == pytest.approx([expected(pictures[i], t, 2.0) for i, t in pairs])


def test_the_function_is_called_once_and_the_judge_with_plain_images_and_texts_of_at_most_a_batch(module, pictures):
    name = module("""
        from PIL import Image

        devices, calls = [], []

        def make(device, **options):
            devices.append((device, options))

            def judge(images, prompts):
                assert type(images) is list and type(prompts) is list
                assert all(type(i) is Image.Image and i.mode == "RGB" for i in images)
                assert all(type(p) is str for p in prompts)
                calls.append(len(images))
                return [0.0] * len(prompts)

            return judge
    """)
    loaded = scorer.load(scorer_of(f"{name}:make", options={"a": 1, "b": "two"}, batch_size=2), "cpu")
    odd = [Picture(Image.new(m, (6, 4))) for m in ("L", "RGBA", "P", "1")]
    for _ in range(2):
        judge(loaded, [*pictures, *odd], ["a"] * 7)
    assert sys.modules[name].devices == [("cpu", {"a": 1, "b": "two"})]
    assert sys.modules[name].calls == [2, 2, 2, 1] * 2


@pytest.mark.parametrize(
    "result",
    [
        "values",
        "tuple(values)",
        "(v for v in values)",
        "np.array(values)",
        "np.array(values, np.float16)",
        "[np.float32(v) for v in values]",
        "torch.tensor(values)",
        "torch.tensor(values, dtype=torch.bfloat16)",
        "torch.tensor(values, requires_grad=True)",
        "[torch.tensor(v) for v in values]",
        "[int(v) for v in values]",
    ],
)
def test_scores_may_be_a_list_an_array_or_a_tensor(module, pictures, result):
    name = module(f"""
        import numpy as np, torch

        def make(device):
            def judge(images, prompts):
                values = [float(len(p)) for p in prompts]
                with torch.inference_mode(False):
                    return {result}
            return judge
    """)
    assert judge(scorer.load(scorer_of(f"{name}:make")), pictures, ["a", "bb", "ccc"]).tolist() == [1, 2, 3]


def test_a_judge_that_changes_its_images_changes_nobody_elses(module, pictures):
    name = module("""
        def make(device):
            def judge(images, prompts):
                sizes = [i.width for i in images]
                for image in images:
                    image.thumbnail((2, 2))
                return sizes
            return judge
    """)
    loaded = scorer.load(scorer_of(f"{name}:make"))
    prepared = [loaded.prepare(p) for p in pictures]
    widths = [p.rgb.width for p in pictures]
    assert (
        loaded.score_pairs(prepared, [(i, p) for i in range(3) for p in "ab"]).tolist() == np.repeat(widths, 2).tolist()
    )
    assert [p.rgb.width for p in pictures] == widths


@pytest.mark.parametrize(
    "error", ["torch.OutOfMemoryError('full')", "MemoryError()", 'RuntimeError("can\'t allocate memory")']
)
def test_memory_that_runs_out_halves_the_batch(module, pictures, error):
    name = module(f"""
        import torch

        calls = []

        def make(device):
            def judge(images, prompts):
                calls.append(len(images))
                if len(images) > 2:
                    raise {error}
                return [float(len(p)) for p in prompts]
            return judge
    """)
    loaded = scorer.load(scorer_of(f"{name}:make", batch_size=8))
    prompts = [c * (k + 1) for k, c in enumerate("abcdef")]
    assert judge(loaded, pictures * 2, prompts).tolist() == [1, 2, 3, 4, 5, 6]
    assert sys.modules[name].calls == [6, 4, 2, 2, 2]
    assert loaded.batch_size == 2
    assert ["batch halved to 4" in m or "batch halved to 2" in m for m in loaded.messages] == [True, True]


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[1.0]", "found 1$"),
        ("[1.0] * 4", "found 4$"),
        ("1.0", "found float$"),
        ("None", "found NoneType$"),
        ("'abc'", "found str$"),
        ("{0: 1.0, 1: 2.0, 2: 3.0}", "found dict$"),
        ("np.zeros((3, 1))", r"found ndarray of shape \(3, 1\)$"),
        ("torch.zeros(2)", r"found Tensor of shape \(2,\)$"),
        ("torch.zeros(())", r"found Tensor of shape \(\)$"),
        ("[1.0, 'good', 2.0]", "found str at position 1$"),
        ("[1.0, None, 2.0]", "found NoneType at position 1$"),
        ("[1.0, [2.0], 2.0]", "found list at position 1$"),
        ("[1.0, np.zeros(1), 2.0]", "found ndarray at position 1$"),
        ("[1.0, 2.0, float('nan')]", "found nan at position 2; a score is finite"),
        ("torch.tensor([1.0, float('-inf'), 2.0])", "found -inf at position 1"),
        ("[1e39, 1.0, 2.0]", "found inf at position 0"),
    ],
)
def test_what_is_no_score_is_refused_by_scorer_and_function(module, pictures, result, message):
    name = module(f"""
        import numpy as np, torch

        def make(device):
            return lambda images, prompts: {result}
    """)
    loaded = scorer.load(scorer_of(f"{name}:make"))
    with pytest.raises(CustomScorerError, match=message) as error:
        judge(loaded, pictures, ["a"] * 3)
    who = f"scorer 'mine', function '{name}:make': expected 3 numbers, one per image and prompt, "
    assert str(error.value).startswith(who)


def test_an_error_in_the_judge_is_named_with_its_place_and_kept_as_the_cause(module, pictures, tmp_path):
    name = module("""
        def make(device):
            def judge(images, prompts):
                return {}["scores"]
            return judge
    """)
    with pytest.raises(CustomScorerError) as error:
        judge(scorer.load(scorer_of(f"{name}:make")), pictures, ["a"] * 3)
    assert str(error.value) == (
        f"scorer 'mine', function '{name}:make': failed on 3 images: KeyError: 'scores' ({tmp_path}/code/{name}.py, line 4)"
    )
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "def make(device):\n    return 3",
            {},
            r"expected it to return a function judge\(images, prompts\), found int$",
        ),
        ("def make(device):\n    return None", {}, "found NoneType$"),
        ("def make(device):\n    raise OSError('no weights')", {}, "failed for device 'cpu' .*: OSError: no weights"),
        ("def make(device):\n    return print", {"size": 3}, r"options {'size': 3}: TypeError: .*'size'"),
        ("import absent_module\ndef make(device): ...", {}, "its module cannot be imported: ModuleNotFoundError"),
        ("def make(device)\n    pass", {}, "its module cannot be imported: SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_with_the_cause(module, source, options, message):
    name = module(source)
    with pytest.raises(CustomScorerError, match=message) as error:
        scorer.load(scorer_of(f"{name}:make", options=options))
    assert f"scorer 'mine', function '{name}:make': " in str(error.value)


def test_a_missing_function_is_answered_with_those_that_are_there(module):
    name = module("from json import loads\nmake = 3\ndef other(device): ...\ndef third(device): ...")
    for function in ("make", "absent"):
        with pytest.raises(
            CheckpointError, match=rf"{name}.py has no function '{function}'; it has \['other', 'third'\]"
        ):
            scorer.load(scorer_of(f"{name}:{function}"))


@pytest.mark.parametrize("function", ["absent_module:make", "absent.module:make", "nothing", ":make", "pipelines:"])
def test_a_missing_module_is_answered_with_what_is_expected(function):
    with pytest.raises(
        CheckpointError, match="expected 'module:function' of a module that Python finds; set PYTHONPATH"
    ):
        checkpoints.revision(scorer_of(function))


def test_code_that_changed_after_it_was_imported_does_not_score_under_the_new_revision(module):
    name = module(BRIGHT)
    config = scorer_of(f"{name}:bright")
    before = scorer.load(config).revision
    module(BRIGHT + "# another one\n", name)
    assert checkpoints.revision(config) != before
    with pytest.raises(CustomScorerError, match="its file changed after this process had imported it; start again"):
        scorer.load(config)


# --- revision --------------------------------------------------------------------------------------------------------


def test_the_revision_is_of_source_function_options_and_name(module):
    name = module(BRIGHT)
    base = scorer_of(f"{name}:bright", options={"factor": 2.0, "when": dt.date(2024, 6, 1)})
    same = {"name": "other", "batch_size": 3}
    assert checkpoints.revision(base.model_copy(update=same)) == checkpoints.revision(base)
    changes = (
        {"options": {"factor": 3.0}},
        {"revision": "v2"},
        {"precision": "bfloat16"},
        {"function": f"{name}:other"},
        {"function": f"{module(BRIGHT + '#')}:bright"},
    )
    revisions = [checkpoints.revision(base.model_copy(update=c)) for c in changes]
    assert len({*revisions, checkpoints.revision(base)}) == len(changes) + 1


def test_a_module_of_a_package_is_known_by_its_own_file(module):
    module("", "judges_of_mine.__init__")
    module(BRIGHT, "judges_of_mine.bright")
    config = scorer_of("judges_of_mine.bright:bright")
    assert checkpoints.custom_source(config).name == "bright.py"
    assert scorer.load(config).revision == checkpoints.revision(config)


# --- a whole shard ---------------------------------------------------------------------------------------------------


def test_a_shard_is_scored_by_a_custom_scorer_beside_another(ingested_copy, tiny_config, module):
    store, keys = ingested_copy
    config = scorer_of(f"{module(BRIGHT)}:bright", options={"factor": 0.5}, revision="v1", batch_size=5)
    scorers = [tiny_config.scorers[0], config]
    models = {}
    for key in keys:
        built = batches.score_shard(store, key, scorers, models=models)
    batches.activate(store, tiny_config.model_copy(update={"scorers": tuple(scorers)}), keys)
    found = batches.current_scores(store, ["mine"], keys).collect()
    assert set(found["status"]) == {"ok"}
    data = dict(store.scan(schemas.IMAGES).select("image_id", "bytes").collect().iter_rows())
    prompts = dict(store.read(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt").iter_rows())
    for row in found.sample(20, seed=0).iter_rows(named=True):
        picture = Picture(images.decode(data[row["image_id"]]))
        assert row["score"] == pytest.approx(expected(picture, prompts[row["prompt_id"]], 0.5), rel=1e-6)
    extra = built["mine"].manifest.extra
    named = {"kind": "custom", "function": config.function, "options": {"factor": 0.5}, "revision_name": "v1"}
    assert named.items() <= extra.items()
    assert extra["revision"] == checkpoints.revision(config)
    assert all(b.is_reused for b in batches.score_shard(store, keys[0], scorers).values())


def test_options_that_are_no_json_are_told_as_text(module, ingested_copy):
    store, keys = ingested_copy
    name = module("def make(device, since):\n    return lambda images, prompts: [since.year] * len(images)")
    config = scorer_of(f"{name}:make", options={"since": dt.date(2024, 6, 1)})
    built = batches.score_shard(store, keys[0], [config])["mine"]
    assert built.manifest.extra["options"] == {"since": "2024-06-01"}
    assert store.read(schemas.SCORES, built.manifest.partition)["score"].unique().to_list() == [2024.0]


def test_a_failing_judge_commits_nothing(module, ingested_copy):
    store, keys = ingested_copy
    name = module("def make(device):\n    return lambda images, prompts: [float('nan')] * len(images)")
    with pytest.raises(CustomScorerError, match="found nan"):
        batches.score_shard(store, keys[0], [scorer_of(f"{name}:make")])
    assert store.manifests("scores") == []


def test_the_error_survives_the_way_out_of_a_worker_process():
    import pickle

    error = pickle.loads(pickle.dumps(custom.CustomScorerError("scorer 'mine': failed")))
    assert str(error) == "scorer 'mine': failed"
