"""Every recipe is a model that can be built, and a run that hangs together."""

import subprocess
import sys

import pytest
import torch

from benthic.base.config import from_dict, to_dict
from benthic.model import hf
from benthic.model.count import parameters
from benthic.model.hf_config import from_hf, to_hf
from benthic.recipes import small, tiny, v1, v2, v3
from benthic.recipes.demo import DemoConfig

RECIPES = {"tiny": tiny, "small": small}
PUBLISHED = {  # recipe -> (parameters, active with embedding and head), as the released files have them
    v1.llm_7b: (6_910_365_696, 6_910_365_696),
    v1.llm_67b: (67_425_001_472, 67_425_001_472),
    v1.moe_16b: (16_375_728_128, 2_828_650_496),
    v2.v2: (235_741_434_880, 21_375_800_320),
    v2.v2_lite: (15_706_484_224, 2_661_150_208),
    v3.v3: (671_026_419_200, 37_552_297_472),
}
FAMILY = [*PUBLISHED, v1.moe_2b, v3.r1_distill_qwen_1_5b, v3.r1_distill_qwen_7b, v3.r1_distill_llama_8b]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_model_builds_on_the_meta_device_with_the_counted_parameters(recipe) -> None:
    model = hf.empty(recipe.model(), "meta", torch.float32)
    count = parameters(recipe.model())
    assert sum(t.numel() for t in model.state_dict().values()) == count.total + count.mtp


@pytest.mark.parametrize("recipe", FAMILY, ids=lambda recipe: recipe.__name__)
def test_published_models_build_on_the_meta_device_with_the_counted_parameters(recipe) -> None:
    config = recipe()
    model = hf.empty(config, "meta", torch.bfloat16)
    count = parameters(config)
    assert sum(t.numel() for t in model.state_dict().values()) == count.total + count.mtp
    assert (count.total, count.active) == PUBLISHED.get(recipe, (count.total, count.active))
    assert from_hf(to_hf(config, "bfloat16"), "here") == config


def test_deepseek_moe_2b_has_two_billion_parameters_and_three_hundred_million_active() -> None:
    count = parameters(v1.moe_2b())
    assert (round(count.total / 1e9, 1), round(count.active / 1e9, 1)) == (2.0, 0.3)


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
