import subprocess
import sys

import pytest

from trainers.recipes import RECIPES, recipe


def test_every_recipe_is_found_under_its_own_name():
    for name in RECIPES:
        assert recipe(name).name == name


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
