"""How a shard is walked: resumption, memory, repeated prompts and pictures, several processes, forecasts."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import polars as pl
import pytest
import torch

from pipelines import images, schemas, steps, stored
from pipelines.config import ConfigError, ScorerConfig
from pipelines.scoring import batches, checkpoints, devices, forecast, scorer, workers
from pipelines.scoring.pictures import Picture
from pipelines.sources import SourceError
from pipelines.tables import StoreError


@pytest.fixture
def clip(tiny_config):
    return next(s for s in tiny_config.scorers if s.name == "clip").model_copy(update={"batch_size": 8})


@pytest.fixture
def largest(ingested_copy):
    """(store, key of the shard that owns most)."""
    store, _ = ingested_copy
    owners = store.read(schemas.CATALOGUE_SCORABLES)["owner"].value_counts(sort=True)
    return store, owners["owner"][0]


def rows_of(store, built):
    return store.read(schemas.SCORES, built.manifest.partition).sort("image_id", "prompt_id")


def parts_of(store):
    return store.list_files("_parts")


class Killed(BaseException):
    """Stands for a process that ends here."""


def killed_after(monkeypatch, chunks):
    """Let the walk over images end after some chunks, as a kill would; return the ids decoded so far."""
    real, decoded = stored.read_images, []

    def read(*arguments):
        for i, rows in enumerate(real(*arguments)):
            if i == chunks:
                raise Killed
            decoded.extend(r.image_id for r in rows)
            yield rows

    monkeypatch.setattr(stored, "read_images", read)
    return decoded


# --- resumption ------------------------------------------------------------------------------------------------------


def test_a_killed_run_continues_behind_its_finished_parts_and_gives_the_same_scores(largest, clip, monkeypatch):
    store, key = largest
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(Killed):
            batches.score_shard(store, key, [clip], part_seconds=0)
    finished = len(parts_of(store))
    assert finished >= 5 - batches.AHEAD
    assert store.manifests("scores") == [], "a part is no table"
    seen = []
    real = images.decode
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", lambda data: seen.append(data) or real(data))
        built = batches.score_shard(store, key, [clip], part_seconds=0)["clip"]
    owned = batches.owned_pairs(store, [key]).collect()
    assert len(seen) == owned["image_id"].n_unique() - 8 * finished, "finished images are not decoded again"
    assert parts_of(store) == []
    resumed = rows_of(store, built)
    batches_again = batches.score_shard(store, key, [clip.model_copy(update={"name": "whole"})])["whole"]
    whole = rows_of(store, batches_again)
    assert resumed.drop("score").equals(whole.drop("score"))
    np.testing.assert_allclose(resumed["score"], whole["score"], atol=1e-5)


def test_a_killed_process_loses_at_most_what_no_part_holds(largest, clip, tmp_path):
    store, key = largest
    program = textwrap.dedent(
        f"""
        import os, signal
        from pipelines import stored
        from pipelines.config import ScorerConfig
        from pipelines.scoring import batches
        from pipelines.tables import Store
        real = stored.read_images
        def read(*arguments):
            for i, rows in enumerate(real(*arguments)):
                if i == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield rows
        stored.read_images = read
        scorer = ScorerConfig.model_validate_json({clip.model_dump_json()!r})
        batches.score_shard(Store({store.location!r}), {key!r}, [scorer], part_seconds=0)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    held = sum(len(pl.read_parquet(store.path(p))) for p in parts_of(store))
    assert held >= 8 * (6 - batches.AHEAD) / 2
    before = batches.unfinished(
        store,
        clip,
        key,
        batches.owned_pairs(store, [key]).collect(),
        store.require("images", key).content,
    )
    built = batches.score_shard(store, key, [clip])["clip"]
    assert built.manifest.extra["pairs_scored"] == len(before) == built.manifest.rows - held


def test_parts_of_other_weights_or_another_ownership_are_not_taken(
    largest, clip, monkeypatch, tmp_path, make_tiny_clip
):
    store, key = largest
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(Killed):
            batches.score_shard(store, key, [clip], part_seconds=0)
    other = clip.model_copy(update={"checkpoint": str(make_tiny_clip(tmp_path / "other", seed=3))})
    built = batches.score_shard(store, key, [other])["clip"]
    assert built.manifest.extra["pairs_scored"] == built.manifest.rows
    assert parts_of(store), "the parts of the other revision stay for it"
    scorables = store.read(schemas.CATALOGUE_SCORABLES)
    mine = scorables.filter(owner=key)
    fewer = scorables.join(mine.head(1), on=scorables.columns, how="anti")
    inputs = store.require("catalogue_scorables").inputs
    store.write(schemas.CATALOGUE_SCORABLES, fewer, made_from="x", inputs=inputs)
    built = batches.score_shard(store, key, [clip])["clip"]
    assert built.manifest.extra["pairs_scored"] == built.manifest.rows == len(mine) - 1
    assert parts_of(store) == [], "the commit removes what is of no use any more"


def test_parts_that_are_not_due_yet_are_not_written(largest, clip, monkeypatch):
    store, key = largest
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(Killed):
            batches.score_shard(store, key, [clip], part_seconds=1000)
    assert parts_of(store) == []


def test_a_resumed_run_scores_for_each_scorer_what_that_scorer_lacks(largest, clip, monkeypatch):
    store, key = largest
    second = clip.model_copy(update={"name": "second"})
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(Killed):
            batches.score_shard(store, key, [clip], part_seconds=0)
    held = 8 * len(parts_of(store))
    built = batches.score_shard(store, key, [clip, second])
    assert built["second"].manifest.extra["pairs_scored"] == built["second"].manifest.rows
    assert built["clip"].manifest.extra["pairs_scored"] <= built["clip"].manifest.rows - held
    assert rows_of(store, built["clip"])["image_id"].equals(rows_of(store, built["second"])["image_id"])


def test_replaced_weights_are_loaded_again_and_never_scored_under_the_wrong_revision(
    ingested_copy, clip, tmp_path, make_tiny_clip
):
    store, _ = ingested_copy
    owners = store.read(schemas.CATALOGUE_SCORABLES)["owner"].value_counts(sort=True)["owner"]
    folder = make_tiny_clip(tmp_path / "mine", seed=5)
    mine = clip.model_copy(update={"checkpoint": str(folder)})
    models = {}
    first = batches.score_shard(store, owners[0], [mine], models=models)["clip"]
    other = make_tiny_clip(tmp_path / "other", seed=6)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    second = batches.score_shard(store, owners[1], [mine], models=models)["clip"]
    assert first.manifest.extra["revision"] != second.manifest.extra["revision"] == checkpoints.revision(mine)
    fresh = batches.score_shard(store, owners[1], [clip.model_copy(update={"checkpoint": str(other), "name": "fresh"})])
    a, b = rows_of(store, second), rows_of(store, fresh["fresh"])
    assert a["score"].equals(b["score"])


def test_weights_that_change_while_they_are_read_are_refused(largest, clip, monkeypatch):
    store, key = largest
    real = batches.load

    class Changed:
        revision = "another"

    monkeypatch.setattr(batches, "load", lambda config, device: real(config, device) and Changed())
    with pytest.raises(checkpoints.CheckpointError, match="changed while they were read"):
        batches.score_shard(store, key, [clip])
    assert store.manifests("scores") == []


def test_what_one_scorer_cannot_take_the_others_score(largest, clip):
    store, key = largest
    picky, other = Counting(clip.model_copy(update={"name": "picky"})), Counting(clip)
    picky.preprocessing = "picky"
    taken = picky.prepare

    def prepare(picture):
        if np.asarray(picture.rgb)[0, 0, 0] > 128:
            raise images.UndecodableImage("its package fails on bright corners")
        return taken(picture)

    picky.prepare = prepare
    built = batches.score_shard(store, key, [picky.config, clip], models={"picky": picky, "clip": other})
    mine, theirs = rows_of(store, built["picky"]), rows_of(store, built["clip"])
    assert set(theirs["status"]) == {"ok"}
    assert set(mine["status"]) == {"ok", "unscorable"}
    refused = mine.filter(status="unscorable")
    assert refused["score"].null_count() == len(refused)
    assert set(refused["reason"]) == {"its package fails on bright corners"}


def test_a_score_that_is_no_number_is_an_error_that_names_the_image_and_is_kept_nowhere(largest, clip):
    store, key = largest
    model = Counting(clip)
    real = model.compare
    model.compare = lambda features, rows, prompts: real(features, rows, prompts).log().neg().sqrt()
    with pytest.raises(
        checkpoints.ScoringError, match=r"scorer 'clip'.*score of image [0-9a-f]{32} with the prompt .* is nan"
    ):
        batches.score_shard(store, key, [clip], models={"clip": model}, part_seconds=0)
    assert parts_of(store) == []
    assert store.manifests("scores") == []


def test_a_shard_whose_lost_images_stay_lost_is_not_scored_again_and_one_that_is_back_is_alone(
    largest, clip, monkeypatch
):
    store, key = largest
    owned = batches.owned_pairs(store, [key]).collect()["image_id"].unique(maintain_order=True).to_list()
    gone = set(owned[:2])
    real = stored.read_images

    def read(*arguments):
        for rows in real(*arguments):
            yield [
                stored.StoredImage(r.image_id, None, "missing", "the disk is away", True) if r.image_id in gone else r
                for r in rows
            ]

    monkeypatch.setattr(stored, "read_images", read)
    first = batches.score_shard(store, key, [clip])["clip"].manifest
    assert (first.extra["images_lost"], first.rows_by_status["missing"]) == (2, 2)
    monkeypatch.setattr(batches, "load", None)
    again = batches.score_shard(store, key, [clip])["clip"]
    assert again.is_reused
    assert again.manifest == first
    monkeypatch.undo()
    monkeypatch.setattr(stored, "read_images", read)
    gone.pop()
    seen = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda data: seen.append(data) or decode(data))
    then = batches.score_shard(store, key, [clip])["clip"].manifest
    assert len(seen) == 1
    assert (then.extra["images_lost"], then.rows, then.extra["pairs_scored"]) == (1, first.rows, 2)


def test_images_that_were_missing_at_ingestion_already_are_not_looked_for_again(largest, clip, monkeypatch):
    store, key = largest
    absent = batches.owned_pairs(store, [key]).collect()["image_id"][0]
    real = stored.read_images

    def read(*arguments):
        for rows in real(*arguments):
            yield [
                stored.StoredImage(absent, None, "missing", "no such file") if r.image_id == absent else r for r in rows
            ]

    monkeypatch.setattr(stored, "read_images", read)
    first = batches.score_shard(store, key, [clip])["clip"].manifest
    assert (first.extra["images_lost"], first.rows_by_status["missing"]) == (0, 1)
    monkeypatch.setattr(batches, "load", None)
    assert batches.score_shard(store, key, [clip])["clip"].is_reused


def test_a_shard_that_owns_nothing_loads_no_model(ingested_copy, clip, monkeypatch):
    store, keys = ingested_copy
    scorables = store.read(schemas.CATALOGUE_SCORABLES)
    inputs = store.require("catalogue_scorables").inputs
    others = scorables.filter(pl.col("owner") != keys[0])
    store.write(schemas.CATALOGUE_SCORABLES, others, made_from="x", inputs=inputs)
    monkeypatch.setattr(batches, "load", None)
    assert batches.score_shard(store, keys[0], [clip])["clip"].manifest.rows == 0


# --- memory ----------------------------------------------------------------------------------------------------------


class Counting(scorer.Scorer):
    """Scores by a picture's mean; counts what it is asked; 'runs out of memory' above `fits` pictures."""

    def __init__(self, config, fits=10**9, error=torch.OutOfMemoryError):
        super().__init__(config)
        self.preprocessing, self.fits, self.error = "mean", fits, error
        self.sizes, self.encoded, self.alive, self.most = [], [], 0, 0
        self.lock = threading.Lock()

    def prepare(self, picture):
        with self.lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
        return torch.tensor(np.asarray(picture.rgb, dtype=np.float32).mean())

    def encode_prompts(self, prompts):
        self.encoded += prompts

    def encode_images(self, batch):
        if len(batch) > self.fits:
            raise self.error("can't allocate memory")
        self.sizes.append(len(batch))
        with self.lock:
            self.alive -= len(batch)
        return batch

    def compare(self, features, rows, prompts):
        return features[rows] + torch.tensor([float(len(p)) for p in prompts])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_running_out_of_memory_halves_the_batch_and_changes_no_score(clip, error):
    config = clip.model_copy(update={"batch_size": 64})
    pictures = [torch.tensor(float(i)) for i in range(100)]
    prompts = ["x" * (i % 7) for i in range(100)]
    small, large = Counting(config, fits=20, error=error), Counting(config)
    assert small.score(pictures, prompts).tolist() == large.score(pictures, prompts).tolist()
    assert small.batch_size == 16
    assert max(small.sizes) == 16
    assert [m.split(", batch")[1] for m in small.messages] == [" halved to 32", " halved to 16"]
    assert large.sizes == [64, 36]


def test_one_picture_that_does_not_fit_is_an_error(clip):
    with pytest.raises(torch.OutOfMemoryError):
        Counting(clip, fits=0).score([torch.tensor(0.0)], [""])


def test_other_errors_do_not_halve_the_batch(clip):
    class Broken(Counting):
        def encode_images(self, batch):
            raise RuntimeError("shapes do not fit")

    broken = Broken(clip)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        broken.score([torch.tensor(0.0)], [""])
    assert broken.batch_size == clip.batch_size


def test_a_picture_is_encoded_once_however_many_prompts_it_meets(clip):
    model = Counting(clip)
    pairs = [(i, "x" * k) for k in range(5) for i in range(10)]
    values = model.score_pairs([torch.tensor(float(i)) for i in range(10)], pairs)
    assert values.tolist() == [float(i + len(p)) for i, p in pairs]
    assert sum(model.sizes) == 10


def test_what_is_decoded_ahead_is_bounded(largest, clip, monkeypatch):
    store, key = largest
    model = Counting(clip)
    slow = model.encode_images
    model.encode_images = lambda batch: time.sleep(0.02) or slow(batch)
    batches.score_shard(store, key, [clip], models={"clip": model}, threads=4)
    assert sum(model.sizes) > 8 * (batches.AHEAD + 3)
    assert model.most <= clip.batch_size * (batches.AHEAD + 1)


def test_threads_decode_while_the_model_works(largest, clip):
    store, key = largest
    model = Counting(clip)
    together = []
    real = model.encode_images

    def watch(batch):
        before = model.alive
        time.sleep(0.05)
        together.append(model.alive > before)
        return real(batch)

    model.encode_images = watch
    batches.score_shard(store, key, [clip], models={"clip": model}, threads=2)
    assert any(together)


def test_each_distinct_prompt_is_encoded_once_and_in_full_batches(largest, clip, monkeypatch):
    store, key = largest
    model = scorer.load(clip)
    encoded = []
    real = model.tokenize
    model.tokenize = lambda prompts: encoded.append(list(prompts)) or real(prompts)
    batches.score_shard(store, key, [clip], models={"clip": model})
    prompts = [p for part in encoded for p in part]
    assert sorted(prompts) == sorted(batches.owned_pairs(store, [key]).collect()["prompt"].unique())
    assert [len(p) for p in encoded[:-1]] == [8] * (len(encoded) - 1)


def test_kept_prompts_are_bounded_and_those_asked_for_are_there():
    calls = []

    def encode(prompts):
        calls.extend(prompts)
        return torch.tensor([[float(len(p))] for p in prompts])

    kept = scorer.PromptFeatures(encode, limit=4)
    kept.add(["a", "bb", "ccc"], 2)
    kept.add(["bb", "dddd", "eeeee"], 2)
    assert kept.take(["eeeee", "bb"]).flatten().tolist() == [5.0, 2.0]
    kept.add(["bb"], 2)
    assert calls == ["a", "bb", "ccc", "bb", "dddd", "eeeee"]


def test_scorers_with_the_same_preprocessing_share_a_prepared_picture(largest, clip, monkeypatch):
    store, key = largest
    models = {n: scorer.load(clip.model_copy(update={"name": n})) for n in ("one", "two")}
    prepared = []
    for model in models.values():
        real = model.prepare
        model.prepare = lambda picture, real=real: prepared.append(1) or real(picture)
    configs = [clip.model_copy(update={"name": n}) for n in models]
    batches.score_shard(store, key, configs, models=models)
    assert len(prepared) == batches.owned_pairs(store, [key]).collect()["image_id"].n_unique()


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (2, 16384), (1, 16384)])
def test_a_thread_of_pixels_costs_no_gigabyte_and_shows_its_middle(shape, monkeypatch):
    import time

    from PIL import Image

    from pipelines.scoring import pictures

    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    data = np.broadcast_to(ramp[:, None] if shape[1] > shape[0] else ramp[None], (shape[1], shape[0]))
    picture = Picture(Image.fromarray(np.repeat(data[..., None], 3, -1)))
    start = time.perf_counter()
    squares = [how(picture, 224) for how in (pictures.crop_floor, pictures.crop_round)]
    assert time.perf_counter() - start < 1
    for square in squares:
        assert square.shape == (3, 224, 224)
        assert square.float().mean() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("size", [(301, 47), (47, 301), (640, 384), (3, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_square_made_alone_is_that_of_the_whole_resized_picture(size, mode, monkeypatch):
    from PIL import Image

    from pipelines.scoring import pictures

    # Smooth: Pillow chooses the order of its two passes by the shape, and noise overshoots differently in each.
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    waves = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 128 + 90 * np.sin((x + y) / 11)], -1)
    image = Image.fromarray(waves.astype(np.uint8)).convert(mode)
    for how in (pictures.crop_floor, pictures.crop_round):
        whole = how(Picture(image), 64)
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "_LARGEST_RESIZED", 0)
            alone = how(Picture(image), 64)
        assert (whole.float() - alone.float()).abs().mean() < 0.05


def test_pictures_of_many_sizes_share_one_resize():
    from PIL import Image

    picture = Picture(Image.new("RGB", (301, 225)))
    assert picture.shortest(32) is picture.shortest(32, own_mode=True)
    palette = Picture(Image.new("P", (301, 225)))
    assert palette.shortest(32) is not palette.shortest(32, own_mode=True)


# --- several processes -----------------------------------------------------------------------------------------------


def test_workers_give_the_scores_of_one_process(ingested_copy, tiny_config):
    store, keys = ingested_copy
    # The names of tests are not importable by a spawned worker; what it is given must be enough.
    scorers = [s.model_copy(update={"name": f"{s.name}_many"}) for s in tiny_config.scorers]
    many = dict(workers.score_shards(store, tiny_config, keys, scorers, device="cpu", workers=2))
    assert sorted(many) == sorted(keys)
    for key in keys:
        one = batches.score_shard(store, key, list(tiny_config.scorers))
        for s in tiny_config.scorers:
            a, b = rows_of(store, one[s.name]), rows_of(store, many[key][f"{s.name}_many"])
            assert a.drop("score").equals(b.drop("score"))
            np.testing.assert_allclose(a["score"], b["score"], atol=1e-4)
    again = dict(workers.score_shards(store, tiny_config, keys, scorers, device="cpu", workers=2))
    assert all(b.is_reused for built in again.values() for b in built.values())


def test_a_shard_that_cannot_be_read_costs_itself_alone(ingested_copy, tiny_config, clip, monkeypatch):
    store, keys = ingested_copy
    real = stored.read_images

    def read(store, key, *rest):
        if key == keys[1]:
            raise SourceError("refused for now")
        return real(store, key, *rest)

    monkeypatch.setattr(stored, "read_images", read)
    results = dict(workers.score_shards(store, tiny_config, keys, [clip], device="cpu"))
    assert isinstance(results[keys[1]], SourceError)
    assert all(isinstance(results[k], dict) for k in keys if k != keys[1])


def test_a_missing_checkpoint_ends_all_workers_with_its_own_error(ingested_copy, tiny_config, clip, tmp_path):
    store, keys = ingested_copy
    absent = clip.model_copy(update={"checkpoint": str(tmp_path / "absent")})
    with pytest.raises(checkpoints.CheckpointError, match=r"absent/config\.json is missing"):
        list(workers.score_shards(store, tiny_config, keys, [absent], device="cpu", workers=2))


def test_parts_of_the_list_of_shards_are_disjoint_and_whole():
    keys = [f"k{i}" for i in range(11)]
    parts = [workers.part(keys, f"{k}/4") for k in (1, 2, 3, 4)]
    assert sorted(k for part in parts for k in part) == sorted(keys)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ConfigError, match="expected K/N"):
            workers.part(keys, wrong)


def test_one_worker_per_gpu_or_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices.places("cuda", 0) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices.places("cuda", 1) == ["cuda"]
    assert devices.places("cuda", 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert devices.places("cuda:1", 2) == ["cuda:1", "cuda:1"]
    assert devices.places("cpu", 0) == ["cpu"]
    assert devices.places("cpu", 2) == ["cpu", "cpu"]


def test_interrupted_workers_end_at_once(ingested_copy, tiny_config, tmp_path, monkeypatch):
    store, keys = ingested_copy
    (tmp_path / "slow_judge.py").write_text(SLOW_JUDGE)
    (tmp_path / "started").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    monkeypatch.syspath_prepend(tmp_path)
    options = {"folder": str(tmp_path / "started")}
    slow = ScorerConfig(name="slow", kind="custom", function="slow_judge:judge", options=options)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def interrupt_when_started():
        until = time.monotonic() + 60
        while not list((tmp_path / "started").iterdir()) and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=interrupt_when_started)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(workers.score_shards(store, tiny_config, keys, [slow], device="cpu", workers=2))
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert list((tmp_path / "started").iterdir()), "no worker had started: the test says nothing"
    assert multiprocessing.active_children() == []


# --- activation, forecasts -------------------------------------------------------------------------------------------


def test_a_scorer_that_is_complete_becomes_active_though_another_is_not(ingested_copy, tiny_config):
    store, keys = ingested_copy
    first, second = tiny_config.scorers
    for key in keys:
        batches.score_shard(store, key, [first])
    batches.score_shard(store, keys[0], [second])
    active, pending = batches.activate_finished(store, tiny_config, keys)
    assert active == {first.name: checkpoints.revision(first)} == store.current_revisions()
    assert len(pending) == 1
    assert second.name in pending[0]
    with pytest.raises(StoreError, match=second.name):
        batches.activate(store, tiny_config, keys)
    assert store.current_revisions() == active


def test_activation_leaves_scorers_of_other_configurations_active(ingested_copy, tiny_config, tmp_path):
    store, keys = ingested_copy
    first, second = tiny_config.scorers
    for key in keys:
        batches.score_shard(store, key, [first, second])
    both = batches.activate(store, tiny_config, keys)
    alone = tiny_config.model_copy(update={"scorers": (first,)})
    assert batches.activate(store, alone, keys) == both == store.current_revisions()
    absent = second.model_copy(update={"checkpoint": str(tmp_path / "absent"), "name": "absent"})
    active, pending = batches.activate_finished(
        store, tiny_config.model_copy(update={"scorers": (first, absent)}), keys
    )
    assert active == both
    assert len(pending) == 1
    assert "absent/config.json is missing" in pending[0]


def test_labels_are_refused_while_another_revision_than_the_configured_one_is_active(ingested_copy, tiny_config):
    store, keys = ingested_copy
    for key in keys:
        batches.score_shard(store, key, tiny_config.scorers)
    batches.activate(store, tiny_config, keys)
    store.publish("scores/current.json", b'{"revisions": {"pickscore": "0123456789ab", "clip": "0123456789ab"}}')
    with pytest.raises(StoreError, match="the active revision of pickscore is 0123456789ab, the configuration's is"):
        steps.Labels(store, tiny_config, keys).calibration()


def test_leftover_parts_are_gone_once_a_scorer_is_active(ingested_copy, tiny_config):
    store, keys = ingested_copy
    (first, _), one = tiny_config.scorers, tiny_config.model_copy(update={"scorers": tiny_config.scorers[:1]})
    for key in keys:
        batches.score_shard(store, key, [first])
    left = f"_parts/scores/{first.name}/revision={checkpoints.revision(first)}/{keys[0]}/0123/00000-1.parquet"
    store.publish(left, b"")
    batches.activate(store, one, keys)
    assert parts_of(store) == []


def test_a_cuda_device_that_is_not_there_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.resolve_device("cuda:0") == "cuda:0"
    with pytest.raises(ConfigError, match=r"device = 'cuda:1'.* sees 1 CUDA devices"):
        devices.resolve_device("cuda:1")


def test_a_forecast_counts_what_is_left_and_says_where_its_speed_comes_from(ingested_copy, clip, monkeypatch):
    store, keys = ingested_copy
    total = len(store.read(schemas.CATALOGUE_SCORABLES))
    ahead = forecast.forecast(store, keys, [clip])
    (left,) = ahead.scorers
    assert (left.pairs, left.left) == (total, total)
    assert "just now" in left.measured_on
    assert left.hours == pytest.approx(total / left.pairs_per_second / 3600)
    assert ahead.images_left == store.read(schemas.CATALOGUE_SCORABLES)["image_id"].n_unique()
    owned_bytes = pl.concat(
        store.read(schemas.IMAGES, k).join(
            store.read(schemas.CATALOGUE_IMAGES).filter(owner=k), on="image_id", how="semi"
        )
        for k in keys
    )
    assert ahead.read_bytes == owned_bytes["bytes"].bin.size().sum()
    assert store.manifests("scores") == []
    done = batches.score_shard(store, keys[0], [clip])["clip"].manifest
    monkeypatch.setattr(batches, "load", None)
    (left,) = forecast.forecast(store, keys, [clip]).scorers
    assert left.left == total - done.rows
    assert left.pairs_per_second == pytest.approx(done.rows / done.extra["model_seconds"], rel=1e-3)
    assert "last 1 shards" in left.measured_on
    ahead = forecast.forecast(store, keys, [clip], threads=2)
    decoding = done.extra["preparing_seconds"] / done.extra["images_prepared"] * ahead.images_left / 2 / 3600
    assert ahead.preparing_hours == pytest.approx(decoding)
    assert ahead.hours(3) == pytest.approx(max(left.hours, decoding) / 3)
    for key in keys[1:]:
        monkeypatch.undo()
        batches.score_shard(store, key, [clip])
    finished = forecast.forecast(store, keys, [clip])
    assert (finished.scorers[0].left, finished.scorers[0].hours, finished.images_left) == (0, 0.0, 0)
    assert "0 images to decode" in finished.text()


def test_a_forecast_counts_finished_parts_as_done(largest, clip, monkeypatch):
    store, key = largest
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(Killed):
            batches.score_shard(store, key, [clip], part_seconds=0)
    held = sum(len(pl.read_parquet(store.path(p))) for p in parts_of(store))
    (left,) = forecast.forecast(store, [key], [clip], measure=False).scorers
    assert held > 0
    assert left.left == left.pairs - held
    assert left.hours is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_cores_are_those_that_this_process_may_use():
    assert batches.cores() == len(os.sched_getaffinity(0))


SLOW_JUDGE = """
import pathlib, os, time

def judge(device, folder):
    pathlib.Path(folder, str(os.getpid())).touch()

    def score(images, prompts):
        time.sleep(60)
        return [0.0] * len(images)

    return score
"""


def test_workers_of_a_killed_run_end_with_it(ingested_copy, tiny_config, tmp_path):
    import psutil

    store, keys = ingested_copy
    (tmp_path / "slow_judge.py").write_text(SLOW_JUDGE)
    (tmp_path / "started").mkdir()
    config = tiny_config.model_copy(
        update={
            "scorers": (
                ScorerConfig(
                    name="slow",
                    kind="custom",
                    function="slow_judge:judge",
                    options={"folder": str(tmp_path / "started")},
                ),
            )
        }
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = textwrap.dedent(
        f"""
        import pathlib
        from pipelines.config import Config
        from pipelines.scoring import workers
        from pipelines.tables import Store

        if __name__ == "__main__":
            config = Config.model_validate_json(pathlib.Path({str(tmp_path / "config.json")!r}).read_text())
            list(workers.score_shards(Store({store.location!r}), config, {keys!r}, config.scorers, device="cpu", workers=2))
        """
    )
    (tmp_path / "main.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    run = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=environment)
    try:
        until = time.monotonic() + 60
        while len(started := list((tmp_path / "started").iterdir())) < 2:
            assert time.monotonic() < until, "the workers have not started"
            assert run.poll() is None, "the run ended by itself"
            time.sleep(0.1)
        pids = [int(file.name) for file in started]
        assert all(psutil.pid_exists(pid) for pid in pids)
    finally:
        run.kill()
        run.wait()
    until = time.monotonic() + 10
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.1)
