"""Every recipe is a model that can be built, and a run that hangs together."""

import subprocess
import sys

import pytest
import torch

from benthic.base.config import from_dict, to_dict
from benthic.model import hf
from benthic.model.count import parameters
from benthic.recipes import small, tiny
from benthic.recipes.demo import DemoConfig

RECIPES = {"tiny": tiny, "small": small}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_model_builds_on_the_meta_device_with_the_counted_parameters(recipe) -> None:
    model = hf.empty(recipe.model(), "meta", torch.float32)
    count = parameters(recipe.model())
    assert sum(t.numel() for t in model.state_dict().values()) == count.total + count.mtp


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_numbers_survive_json(recipe, smoke: bool) -> None:
    config = recipe.demo(smoke)
    assert from_dict(DemoConfig, to_dict(config)) == config
    assert config.recipe in RECIPES


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_checkpoints_fall_between_explorations_and_prompts_divide(recipe) -> None:
    for config in (recipe.demo(), recipe.demo(smoke=True)):
        updates = config.grpo.steps_per_generation
        assert config.rl.max_steps % updates == 0
        assert config.rl.save_steps % updates == 0


def test_recipes_import_no_torch() -> None:
    code = "import sys, benthic.recipes.tiny, benthic.recipes.small; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
