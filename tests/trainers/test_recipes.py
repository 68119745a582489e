import inspect
import json
import subprocess
import sys

import pytest

from pipelines import schemas
from pipelines.curation import ConsensusPolicy, HumanPolicy, SmoothedPolicy
from trainers import recipes
from trainers.recipes import RECIPES, Inversion, LoRA, Recipe, recipe

EVERY = [make() for make in RECIPES.values()]
every_recipe = pytest.mark.parametrize("rule", EVERY, ids=lambda r: r.name)


def test_every_recipe_is_found_under_its_own_name():
    for name in RECIPES:
        assert recipe(name).name == name


def test_every_function_that_makes_a_recipe_is_listed():
    found = {
        name
        for module in (recipes.tiny, recipes.papers)
        for name, f in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_")
        and inspect.signature(f).return_annotation == "Recipe"
        and not inspect.signature(f).parameters
    }
    assert found == set(RECIPES)


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="balanced_dpo"):
        recipe("dpo")


def test_balanced_dpo_trains_on_the_consensus_with_a_reference_that_moves():
    balanced, plain = recipe("balanced_dpo"), recipe("diffusion_dpo")
    assert balanced.policy.name == "consensus"
    assert plain.policy.name == "human"
    assert balanced.reference.kind == "hard_copy"
    assert plain.reference.kind == "frozen"
    assert balanced.objective == plain.objective


def test_recipes_are_read_without_torch():
    code = "import sys, trainers.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what holds of every recipe --------------------------------------------------------------------------------------


@every_recipe
def test_the_numbers_of_a_recipe_are_plain_and_say_everything(rule):
    numbers = json.loads(json.dumps(rule.numbers()))
    assert numbers["objective"]["kind"] == rule.objective.name
    assert numbers["policy"]["kind"] == rule.policy.name
    assert {"steps", "batch_size", "prompt_dropout", "flip", "start", "family"} <= numbers.keys()
    assert {"kind", "learning_rate", "warmup_steps", "schedule", "weight_decay"} <= numbers["optimiser"].keys()


def test_no_two_recipes_have_the_same_numbers():
    said = [json.dumps({k: v for k, v in r.numbers().items() if k not in ("name", "summary")}) for r in EVERY]
    same = {tuple(r.name for r, s in zip(EVERY, said, strict=True) if s == one) for one in said}
    # The stage that a paper's run needs is by our choice what the baseline is; a run of its own keeps its name.
    assert {names for names in same if len(names) > 1} == {("sft_sd15", "smpo_sft_sd15")}


@every_recipe
def test_a_recipe_is_for_the_backbones_that_its_name_says(rule):
    named = [f for f in ("sd15", "sd21", "sdxl") if rule.name.endswith(f"_{f}")]
    assert [rule.family] == (named or ["tiny"])


@every_recipe
def test_the_pair_policy_gives_what_the_objective_needs(rule):
    if "probability" in rule.objective.needs:
        assert isinstance(rule.policy, SmoothedPolicy)
    if "minority" in rule.objective.needs:
        assert rule.minority_column in schemas.PREFERENCES.polars_schema
        assert isinstance(rule.policy, HumanPolicy), "minority values are of the humans' side"
    else:
        assert rule.minority_column == Recipe("", "", HumanPolicy()).minority_column


@every_recipe
def test_a_recipe_starts_from_one_of_the_same_backbone_with_the_same_kind_of_weights(rule):
    if rule.start:
        start = recipe(rule.start)
        assert (start.family, start.start) == (rule.family, "")
        assert rule.start != rule.name


@every_recipe
def test_warm_up_ends_before_training_does(rule):
    assert 0 <= rule.optimiser.warmup_steps < rule.steps
    assert rule.optimiser.learning_rate > 0


@every_recipe
def test_a_moving_reference_moves_during_the_run_and_is_one_that_the_objective_compares_with(rule):
    if rule.reference.kind != "frozen":
        assert rule.reference.every < rule.steps
        assert "reference" in rule.objective.needs


def test_every_objective_has_a_recipe_at_the_tiny_scale():
    kinds = {o for o in recipes.Objective.__subclasses__() if o.__module__ == recipes.parts.__name__}
    assert {type(r.objective) for r in EVERY if r.family == "tiny"} == kinds


def test_starts_come_before_what_starts_from_them():
    names = [r.name for r in recipes.recipes_in_order(["smpo_sd15", "inpo_sd15"])]
    assert names == ["smpo_sft_sd15", "smpo_sd15", "inpo_sd15"]


# --- the papers' numbers ---------------------------------------------------------------------------------------------

PAPERS = {
    # name: (source, optimiser, rate, warm-up, pairs per step, steps, dropout, beta in z = 0.5 * beta * s)
    "diffusion_dpo_sd15": ("DiffusionDPO launchers/sd15.sh", "adamw", 1e-8 * 2048, 500, 2048, 2000, 0.2, 5000),
    "diffusion_dpo_sdxl": ("DiffusionDPO launchers/sdxl.sh", "adafactor", 1e-8 * 2048, 200, 2048, 2000, 0.2, 5000),
    "smpo_sd15": ("SmPO examples/sd15.sh", "adamw", 1e-8 * 1024, 100, 1024, 200, 0.2, 2000),
    "smpo_released_sd15": ("SmPO examples/sd15.sh", "adamw", 1e-8 * 1024, 100, 1024, 200, 0.2, 2000),
    "smpo_sdxl": ("SmPO examples/sdxl.sh", "adafactor", 1e-8 * 1024, 100, 1024, 200, 0.2, 5000),
    "smpo_released_sdxl": ("SmPO examples/sdxl.sh", "adafactor", 1e-8 * 1024, 100, 1024, 200, 0.2, 5000),
    "inpo_sd15": ("InPO examples/sd15.sh", "adamw", 1e-8 * 1024, 200, 1024, 400, 0.2, 2000),
    "inpo_sdxl": ("InPO examples/sdxl.sh", "adafactor", 1e-8 * 1024, 200, 1024, 400, 0.2, 5000),
    # One epoch of the 851,293 decided pairs of Pick-a-Pic v2; beta 1000 in z = beta * s.
    "adaptive_dpo_sd15": ("arXiv 2503.16921", "adamw", 1e-5, 0, 64, 851_293 // 64, 0.0, 2 * 1000),
    "dspo_sd15": ("DSPO launchers/sd15.sh", "adamw", 1e-8 * 2048, 500, 2048, 2000, 0.2, 0.001),
    "dmpo_sd15": ("Diffusion-SDPO train/sd15_dmpo.sh", "adamw", 1e-8 * 2048, 500, 2048, 2000, 0.2, 2000),
    "sdpo_sd15": ("Diffusion-SDPO train/sd15_diffusion_dpo.sh", "adamw", 1e-8 * 2048, 500, 2048, 2000, 0.2, 5000),
    "sdpo_sdxl": ("Diffusion-SDPO train/sdxl_diffusion_dpo.sh", "adafactor", 1e-9 * 2048, 500, 2048, 2000, 0.2, 5000),
    # 4 processes x 2 x 256 pictures; beta 1000 in b * (g - KL), where b = 0.5 * beta here.
    "kto_sd15": ("diffusion-kto exps/example.sh", "adamw", 1e-7, 200, 4 * 2 * 256 // 2, 20_000, 0.2, 2 * 1000),
    # beta stands outside the sigmoid.
    "mapo_sdxl": ("mapo README", "adamw", 1e-5, 0, 8 * 2, 2000, 0.0, 0.1),
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_has_its_papers_numbers(name):
    _, optimiser, rate, warmup, pairs, steps, dropout, beta = PAPERS[name]
    rule = recipe(name)
    assert rule.optimiser.kind == optimiser
    assert rule.optimiser.learning_rate == pytest.approx(rate, rel=1e-12)
    assert rule.optimiser.warmup_steps == warmup
    assert (rule.batch_size, rule.steps, rule.prompt_dropout) == (pairs, steps, dropout)
    assert rule.objective.beta == pytest.approx(beta)
    # All of these programs' optimisers have weight decay 0.01, gradients clipped at 1, a constant rate, mirrored pictures.
    assert (rule.optimiser.weight_decay, rule.optimiser.max_gradient_norm) == (0.01, 1.0)
    assert rule.optimiser.schedule == "constant"
    assert rule.flip


def test_adaptive_dpo_has_the_released_metric():
    objective = recipe("adaptive_dpo_sd15").objective
    assert (objective.metric, objective.rho, objective.normalise) == ("online", 15.0, True)
    assert (objective.c1, objective.k1, objective.weighting, objective.margin_term) == (
        1.0,
        10.0,
        "linear",
        "quadratic",
    )
    ipo = recipe("adaptive_ipo_sd15").objective
    assert (ipo.form, ipo.beta_ipo) == ("ipo", 100.0)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("adaptive") and n.endswith("_sd15")])
def test_all_adaptive_recipes_share_the_released_set_up(name):
    rule, released = recipe(name), recipe("adaptive_dpo_sd15")
    assert rule.weights == LoRA(rank=8, alpha=8, targets=("to_q", "to_k", "to_v", "to_out.0"))
    assert rule.objective.beta == released.objective.beta
    assert (rule.optimiser, rule.batch_size, rule.steps) == (released.optimiser, released.batch_size, released.steps)


@pytest.mark.parametrize(
    ("name", "noising"),
    [
        ("smpo_released_sd15", Inversion("released", 5, "policy", False)),
        ("smpo_released_sdxl", Inversion("released", 10, "policy", False)),
        ("inpo_sd15", Inversion("inpo", 10, "policy", False)),
        ("inpo_sdxl", Inversion("inpo", 10, "policy", False)),
    ],
)
def test_inversion_is_as_released_where_a_recipe_says_so(name, noising):
    assert recipe(name).noising == noising


def test_smpo_draws_from_the_papers_nine_levels_of_trajectories_that_can_be_kept():
    from trainers import inversion

    for name in ("smpo_sd15", "smpo_sdxl"):
        noising = recipe(name).noising
        assert (noising.mode, noising.under, noising.is_cached) == ("consistent", "reference", True)
        assert len(inversion.drawable(1000, noising.steps, noising.mode)) == 9
        assert recipe(name).objective.gamma == 10.0


def test_what_the_released_sd15_runs_start_from_is_trained_on_the_humans_winners():
    stage = recipe("smpo_sft_sd15")
    assert {recipe(n).start for n in ("smpo_sd15", "smpo_released_sd15", "inpo_sd15")} == {stage.name}
    assert (stage.objective.name, stage.policy) == ("sft", HumanPolicy())
    assert {recipe(n).start for n in ("smpo_sdxl", "smpo_released_sdxl", "inpo_sdxl")} == {""}


def test_balanced_dpo_is_diffusion_dpo_but_for_labels_and_reference():
    for family in ("sd15", "sd21", "sdxl"):
        balanced, plain = recipe(f"balanced_dpo_{family}").numbers(), recipe(f"diffusion_dpo_{family}").numbers()
        assert {k for k in plain if plain[k] != balanced[k]} == {"name", "summary", "policy", "reference"}
        assert recipe(f"balanced_dpo_{family}").policy == ConsensusPolicy()


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_of_text_per_recipe():
    rows = {row[0]: dict(zip(recipes.COLUMNS, row, strict=True)) for row in recipes.table()}
    assert list(rows) == list(RECIPES)
    assert rows["adaptive_dpo_sd15"]["objective"] == "adaptive_dpo online"
    assert rows["adaptive_dpo_sd15"]["weights"] == "lora r=8"
    assert rows["diffusion_dpo_sdxl"]["rate"] == "2.048e-05"
    assert rows["balanced_dpo"]["reference"] == "hard_copy every 20"
    assert rows["mapo"]["reference"] == "none"
    assert rows["smpo"]["noising"] == "consistent-5 under reference, cached"
    assert rows["smpo_released"]["noising"] == "released-5 under policy"


def test_the_listing_is_aligned():
    header, *lines = recipes.listing().splitlines()
    place = header.index("objective")
    assert all(line[place - 1] == " " and line[place] != " " for line in lines)
    assert len(lines) == len(RECIPES)
