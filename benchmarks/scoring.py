"""How fast the store is scored: decode once and batch, against transformers' own processor and model one image at a time.

    python -m benchmarks.scoring

Both score the same small-world pictures with the same two tiny reward models; the runs alternate and the median of five
is printed with the machine. The scores of both ways must agree, or the benchmark fails.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from pipelines import catalogue, images, ingest, schemas
from pipelines.config import Config, small_world
from pipelines.scoring import batches
from pipelines.tables import Store
from pipelines.world.raw import WorldConfig, write_world

RUNS = 5
WORLD = WorldConfig(rows_per_shard=300, hpd_train_prompts=20, hpd_test_groups=10, hpd_test_groups_of_ten=2)


def ours(config: Config, keys: list[str], models: dict) -> float:
    """Score all shards into a store without scores; return seconds."""
    store = Store(config.store_location)
    for manifest in store.manifests("scores"):
        Path(store.path("_manifests", "scores", f"{manifest.partition}.json")).unlink()
    start = time.perf_counter()
    for key in keys:
        batches.score_shard(store, key, list(config.scorers), models=models)
    return time.perf_counter() - start


@torch.inference_mode()
def one_by_one(config: Config, wanted: pl.DataFrame, loaded: dict) -> tuple[float, dict[tuple[str, str, str], float]]:
    """Score every (image, prompt) as a model card's example does; return seconds and scores."""
    scores = {}
    start = time.perf_counter()
    for scorer in config.scorers:
        model, tokenizer, processor = loaded[scorer.name]
        for image_id, prompt_id, prompt, data in wanted.iter_rows():
            pixels = processor(images=images.decode_rgb(data), return_tensors="pt")
            tokens = tokenizer([prompt], padding=True, truncation=True, max_length=24, return_tensors="pt")
            image = model.get_image_features(**pixels).pooler_output
            text = model.get_text_features(**tokens).pooler_output
            cosine = torch.nn.functional.cosine_similarity(image, text)
            value = cosine * model.logit_scale.exp() if scorer.kind == "pickscore" else cosine
            scores[scorer.name, image_id, prompt_id] = value.item()
    return time.perf_counter() - start, scores


def main() -> int:
    """Print the table; return 1 if the two ways disagree."""
    with tempfile.TemporaryDirectory() as home:
        config = small_world(Path(home), WORLD)
        write_world(config.world_folder, WORLD)
        store = Store(config.store_location)
        shards = ingest.list_shards(config)
        for shard in shards:
            ingest.ingest_shard(store, ingest.plan(config.source(shard.source)), shard)
        keys = [s.key for s in shards]
        catalogue.build(store, keys)
        prompts = store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt")
        pixels = store.scan(schemas.IMAGES).select("image_id", "bytes").unique("image_id")
        wanted = store.scan(schemas.CATALOGUE_SCORABLES).select("image_id", "prompt_id")
        wanted = wanted.join(prompts, on="prompt_id").join(pixels, on="image_id").collect()
        models = {s.name: batches.load(s, "cpu") for s in config.scorers}
        loaded = {
            s.name: (
                CLIPModel.from_pretrained(s.checkpoint, dtype=torch.float32).eval(),
                CLIPTokenizer.from_pretrained(s.checkpoint),
                CLIPImageProcessorPil.from_pretrained(s.checkpoint),
            )
            for s in config.scorers
        }
        fast, slow = [], []
        scores: dict = {}
        for run in range(RUNS):
            fast.append(ours(config, keys, models))
            seconds, scores = one_by_one(config, wanted, loaded)
            slow.append(seconds)
            print(f"run {run + 1}/{RUNS}: batched {fast[-1]:.2f} s, one by one {slow[-1]:.2f} s", flush=True)
        revisions = batches.activate(store, config, keys)
        found = batches.current_scores(store, list(revisions), keys).collect()
        worst = max(
            abs(score - scores[name, image, prompt]) / (100 if name == "pickscore" else 1)
            for name, image, prompt, score in found.select("scorer", "image_id", "prompt_id", "score").rows()
        )
    count = len(wanted) * len(config.scorers)
    print(
        f"\n{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, 32 px, tiny CLIP"
    )
    print(f"{'way':<44}{'scores/s':>10}{'median s':>10}")
    for name, times in (("polyphony: decode once, batch", fast), ("transformers: processor + model, one by one", slow)):
        print(f"{name:<44}{count / statistics.median(times):>10.0f}{statistics.median(times):>10.2f}")
    print(f"{count} scores; largest difference of the cosines {worst:.1e}")
    return 0 if worst < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
