"""What lies there of caches, trained models, samples and evaluations, what is older than its inputs, and what to press.

Everything is compared as the steps compare it; no model is loaded and no tensor read. Only of trajectories the exact answer
is left to the dry run (`python -m trainers.train plan`): it would draw every step's timesteps.
Belongs here: the state of what models make. Does not belong here: tables of data (`pipelines.status`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import polars as pl

from pipelines import schemas
from pipelines.config import Config, ConfigError
from pipelines.hub import CheckpointError
from pipelines.prompts import PromptSuiteError
from pipelines.status import Line, line, why_old
from pipelines.tables import WHOLE, Manifest, Store, StoreError
from trainers.recipes import Inversion, Recipe, recipes_in_order

if TYPE_CHECKING:
    from trainers.loop import Run, Trained
    from trainers.steps import Training

BASE = "base"
"""See `trainers.sampling`, which imports torch."""
_CACHE, _TRAIN, _EVALUATE = (f"python -m trainers.train {what}" for what in ("cache", "train", "evaluate"))


def lines(store: Store, config: Config) -> list[Line]:
    """Return the state of everything that models make, in the order in which it is made.

    latents by shard, prompt_embeddings, and of every configured recipe trajectories (if it reads any) and the trained
    model; samples and evaluations of the base and every recipe, held_out of every recipe, the leaderboard. A line of which
    something upstream is not current is not current either.

    Trajectories count as current where the run is finished, or some of the present versions lie where it reads them.

    Raises:
        ConfigError: training.recipes names a recipe that there is not.
    """
    recipes = recipes_in_order(config.training.recipes)
    try:
        # Importing torch takes seconds: whoever wants Dagster's definitions alone must not wait.
        from trainers.steps import Training

        state = _State(store, config, Training(store, config, lambda message: None), recipes)
    except (CheckpointError, ConfigError) as error:
        return list(_unknown(recipes, str(error)))
    return list(state.lines())


def _reads_trajectories(recipe: Recipe) -> bool:
    return isinstance(recipe.noising, Inversion) and recipe.noising.is_cached


def _unknown(recipes: list[Recipe], why: str) -> Iterable[Line]:
    """Yield the lines where the backbone's files or the device are missing: nothing can be compared then."""
    assets = [("latents", "latents", _CACHE), ("prompt_embeddings", "prompt_embeddings", _CACHE)]
    for recipe in recipes:
        if _reads_trajectories(recipe):
            assets.append(("trajectories", f"trajectories/{recipe.name}", _trajectories_command(recipe.name)))
        assets.append(("training_metrics", f"trained/{recipe.name}", f"{_TRAIN} --recipe {recipe.name}"))
    for model in (BASE, *(r.name for r in recipes)):
        assets += [(table, f"{table}/{model}", _EVALUATE) for table in ("samples", "evaluations")]
    assets += [("held_out", f"held_out/{r.name}", _EVALUATE) for r in recipes]
    for table, asset, command in (*assets, ("leaderboard", "leaderboard", _EVALUATE)):
        yield line(table, asset, {WHOLE: why}, (), command)


def _trajectories_command(recipe: str) -> str:
    return f"python -m trainers.train trajectories --recipe {recipe}"


class _State:
    """The commits of what models make, compared with what the steps would make; each table is read once."""

    def __init__(self, store: Store, config: Config, training: Training, recipes: list[Recipe]) -> None:
        self.store, self.config, self.training = store, config, training
        self.recipes = recipes
        self.backbone = training.backbone
        self.trained: dict[str, Trained] = {}
        self.problems: dict[str, str | None] = {}
        """Asset -> why it is not current."""

    def lines(self) -> Iterable[Line]:
        """Yield the lines, what others depend on first."""
        yield self._latents()
        yield self._prompts()
        for recipe in self.recipes:
            yield from self._run(recipe)
        for model in (BASE, *(r.name for r in self.recipes)):
            yield self._samples(model)
            yield self._evaluations(model)
        for recipe in self.recipes:
            yield self._held_out(recipe.name)
        yield self._leaderboard()

    def _line(self, table: str, asset: str, problem: str | None, is_there: bool, command: str) -> Line:
        self.problems[asset] = problem
        return line(table, asset, {WHOLE: problem}, (WHOLE,) if is_there else (), command)

    def _upstream(self, *assets: str) -> str | None:
        """Return that one of these assets is not current; None: all are."""
        return next((f"{a} is not current" for a in assets if self.problems[a] is not None), None)

    def _commit(self, table: str, partition: str = WHOLE) -> Manifest | None:
        return self.store.manifest(table, partition)

    def _old(
        self, table: schemas.Table, partition: str, inputs: Iterable[Manifest], code_version: str, parameters: Any
    ) -> str | None:
        contents: dict[str, str | None] = {f"{m.table}/{m.partition}": m.content for m in inputs}
        return why_old(table, self._commit(table.name, partition), contents, code_version, parameters)

    # --- caches ------------------------------------------------------------------------------------------------------

    def _latents(self) -> Line:
        from trainers import caches

        below = self.backbone.partition("")
        made = {m.partition.removeprefix(below): m for m in self.store.manifests("latents", below)}
        images = {m.partition: m for m in self.store.manifests("images")}
        # Mirrored ones that nobody asks for now do no harm.
        accepted = {True, self.training.mirrors()}
        owned = self._owned()
        problems: dict[str, str | None] = {}
        for key in self.store.catalogued_shards() or ():
            if key not in images:
                problems[key] = "not ingested"
                continue
            inputs: dict[str, str | None] = {f"images/{key}": images[key].content}
            ids = owned.get(key, [])
            found = [
                why_old(
                    schemas.LATENTS,
                    made.get(key),
                    inputs,
                    caches.CODE_VERSION,
                    caches.latents_parameters(ids, self.backbone, flips=flips),
                )
                for flips in sorted(accepted)
            ]
            problems[key] = None if None in found else found[0]
        if not problems:
            problems = {WHOLE: "there is no catalogue yet"}
        return line("latents", "latents", problems, made, _CACHE)

    def _owned(self) -> dict[str, list[str]]:
        """Return shard -> ids of the images that it owns."""
        owners = self.store.scan(schemas.CATALOGUE_IMAGES).group_by("owner").agg(pl.col("image_id")).collect()
        return dict(owners.iter_rows())

    def _prompts(self) -> Line:
        from trainers import caches

        where, prompts = self.backbone.partition("all"), self._commit("catalogue_prompts")
        problem: str | None = "there is no catalogue yet"
        if prompts is not None:
            parameters = caches.prompts_parameters(self.backbone)
            problem = self._old(schemas.PROMPT_EMBEDDINGS, where, [prompts], caches.CODE_VERSION, parameters)
        is_there = self._commit("prompt_embeddings", where) is not None
        return self._line("prompt_embeddings", "prompt_embeddings", problem, is_there, _CACHE)

    # --- runs --------------------------------------------------------------------------------------------------------

    def _run(self, recipe: Recipe) -> Iterable[Line]:
        name, run = recipe.name, None
        try:
            run = self.training.run(name, is_plan=True)
            finished = run.finished()
            problem = None if finished is not None else self._unfinished(run)
        except (StoreError, ConfigError) as error:
            finished, problem = None, str(error)
        if _reads_trajectories(recipe):
            yield self._trajectories(name, run, finished is not None, problem)
        if finished is not None:
            self.trained[name] = finished
        is_there = self._commit("training_metrics", name) is not None
        yield self._line("training_metrics", f"trained/{name}", problem, is_there, f"{_TRAIN} --recipe {name}")

    def _unfinished(self, run: Run) -> str:
        """Return why a run is not the finished one."""
        found = self._commit("training_metrics", run.recipe.name)
        if run.recipe.start and run.start is None:
            return f"trained/{run.recipe.start}, from which it starts, is not current"
        if found is not None and found.fingerprint == run.mark:
            pairs = ", or its log of pairs" if self.config.training.log_pairs else ""
            return f"its model{pairs} is not in {run.folder}"
        inputs: dict[str, str | None] = {f"{m.table}/{m.partition}": m.content for m in run.inputs}
        why = why_old(schemas.TRAINING_METRICS, found, inputs, "", None)
        return why or "trained under other options, or by another version of the program"

    def _trajectories(self, name: str, run: Run | None, is_finished: bool, problem: str | None) -> Line:
        from trainers import trajectories

        made = [] if run is None or run.trajectories is None else self.store.manifests("trajectories", run.trajectories)
        if is_finished:
            problem = None
        elif run is not None:
            is_present = all(m.extra.get("versions") == trajectories.VERSIONS for m in made)
            problem = "not made yet" if not made else None if is_present else "made by another version of the program"
        return self._line("trajectories", f"trajectories/{name}", problem, bool(made), _trajectories_command(name))

    # --- evaluation --------------------------------------------------------------------------------------------------

    def _samples(self, model: str) -> Line:
        from trainers import sampling

        problem = None if model == BASE else self._upstream(f"trained/{model}")
        prompts = self._commit("catalogue_prompts")
        if prompts is None:
            problem = "there is no catalogue yet"
        elif problem is None:
            trained = None if model == BASE else self.trained[model].metrics.manifest
            try:
                parameters = sampling.parameters(self.config, self.backbone, trained)
                problem = self._old(schemas.SAMPLES, model, [prompts], sampling.CODE_VERSION, parameters)
            except (PromptSuiteError, ConfigError) as error:
                problem = str(error)
        is_there = self._commit("samples", model) is not None
        return self._line("samples", f"samples/{model}", problem, is_there, _EVALUATE)

    def _evaluations(self, model: str) -> Line:
        from trainers import evaluate

        problem, samples = self._upstream(f"samples/{model}"), self._commit("samples", model)
        if problem is None and samples is not None:
            try:
                parameters = evaluate.evaluation_parameters(self.config)
                problem = self._old(schemas.EVALUATIONS, model, [samples], evaluate.CODE_VERSION, parameters)
            except CheckpointError as error:
                problem = str(error)
        is_there = self._commit("evaluations", model) is not None
        return self._line("evaluations", f"evaluations/{model}", problem, is_there, _EVALUATE)

    def _held_out(self, recipe: str) -> Line:
        from trainers import evaluate
        from trainers.precision import resolve_precision

        problem = self._upstream(f"trained/{recipe}")
        if problem is None:
            trained = self.trained[recipe].metrics.manifest
            inputs = evaluate.held_out_inputs(self.store, self.backbone, trained)
            precision = resolve_precision(self.config.training.precision, self.backbone.device)
            parameters = evaluate.held_out_parameters(trained, precision)
            problem = self._old(schemas.HELD_OUT, recipe, inputs, evaluate.CODE_VERSION, parameters)
        is_there = self._commit("held_out", recipe) is not None
        return self._line("held_out", f"held_out/{recipe}", problem, is_there, _EVALUATE)

    def _leaderboard(self) -> Line:
        from trainers import evaluate

        names = [r.name for r in self.recipes]
        judged = [("evaluations", m) for m in (BASE, *names)] + [("held_out", n) for n in names]
        problem = self._upstream(*(f"{table}/{model}" for table, model in judged))
        if problem is None:
            inputs = [self.store.require(table, model) for table, model in judged]
            parameters = evaluate.leaderboard_parameters(self.config, names)
            problem = self._old(schemas.LEADERBOARD, WHOLE, inputs, evaluate.CODE_VERSION, parameters)
        return self._line("leaderboard", "leaderboard", problem, self._commit("leaderboard") is not None, _EVALUATE)
