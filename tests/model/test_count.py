import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.model import count
from benthic.model.cache import LatentCache
from benthic.model.config import ModelConfig
from benthic.model.transformer import Transformer


def numbers_in(module: torch.nn.Module) -> int:
    """Every number that a checkpoint of it holds: parameters and gate biases."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def test_v3_has_exactly_the_published_parameters(v3: ModelConfig) -> None:
    assert count.parameters(v3) == count.Parameters(total=671_026_419_200, active=37_552_297_472, mtp=11_610_068_224)
    assert count.attention_parameters(v3) == 187_107_328


def test_v3_built_on_the_meta_device_has_them_too(v3: ModelConfig) -> None:
    model = on_meta(v3)
    assert numbers_in(model) - numbers_in(model.mtp) == 671_026_419_200
    assert numbers_in(model.mtp) == 11_610_068_224
    assert numbers_in(model.layers[0].self_attn) == 187_107_328


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers, group, size = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    kept = draw(st.integers(1, group))
    width = st.integers(1, 9)
    return ModelConfig(
        vocab_size=draw(width),
        hidden_size=8 * draw(width),
        num_hidden_layers=layers,
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        num_attention_heads=draw(width),
        q_lora_rank=draw(width),
        kv_lora_rank=draw(width),
        qk_nope_head_dim=draw(width),
        qk_rope_head_dim=2 * draw(width),
        v_head_dim=draw(width),
        intermediate_size=draw(width),
        moe_intermediate_size=8 * draw(width),
        first_k_dense_replace=draw(st.integers(0, layers)),
        n_shared_experts=draw(st.integers(0, 2)),
        n_routed_experts=group * size,
        num_experts_per_tok=draw(st.integers(1, kept * size)),
        n_group=group,
        topk_group=kept,
    )


@settings(max_examples=40, deadline=None)
@given(configs())
def test_the_count_equals_what_is_built(config: ModelConfig) -> None:
    model, counted = on_meta(config), count.parameters(config)
    assert counted.total == numbers_in(model) - numbers_in(model.mtp)
    assert counted.mtp == numbers_in(model.mtp)
    assert count.attention_parameters(config) == numbers_in(model.layers[0].self_attn)
    idle = config.n_routed_experts - config.num_experts_per_tok
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert counted.total - counted.active == config.moe_layers * idle * per_expert


def test_training_flops_are_six_per_active_weight_plus_causal_attention(tiny: ModelConfig) -> None:
    c = dataclasses.replace(tiny, num_nextn_predict_layers=0)
    weights = count.parameters(c).active - c.vocab_size * c.hidden_size  # the embedding is looked up, not multiplied
    short, long = (count.training_flops_per_token(c, n) for n in (0, 1000))
    assert short == 6 * weights
    per_layer = 2 * (8 + 4 + 12)  # two heads; scores over 12 and values over 12 elements of each visible token
    assert long - short == 6 * 3 * per_layer * 1000 // 2


def test_an_mtp_module_costs_a_layer_its_projection_and_another_head(tiny: ModelConfig) -> None:
    one, none = tiny, dataclasses.replace(tiny, num_nextn_predict_layers=0)
    layer = count.attention_parameters(tiny) + count.moe_parameters(tiny, tiny.num_experts_per_tok)
    extra = layer + 2 * tiny.hidden_size**2 + tiny.vocab_size * tiny.hidden_size
    assert count.training_flops_per_token(one, 0) - count.training_flops_per_token(none, 0) == 6 * extra


def test_v3_caches_35136_elements_per_token(v3: ModelConfig) -> None:
    """68.6 KiB in bfloat16 (V2 Table 1 for V3's shape)."""
    assert count.cache_elements_per_token(v3)["mla"] == 35_136
    assert count.latent_bytes_per_token(v3)["BF16"] == 70_272


def test_the_count_equals_the_bytes_of_a_cache(tiny: ModelConfig) -> None:
    config = dataclasses.replace(tiny, num_nextn_predict_layers=0)
    cache = LatentCache(config, 10, "cpu", torch.bfloat16)
    held = sum(layer.c_kv.nbytes + layer.k_rope.nbytes for layer in cache.layers)
    assert held == 10 * 2 * count.cache_elements_per_token(config)["mla"]


def test_latents_are_the_smallest_but_for_one_shared_head(v3: ModelConfig) -> None:
    sizes = count.cache_elements_per_token(v3)
    assert sizes["mha"] == 61 * 128 * (192 + 128)
    assert sizes["mqa"] < sizes["mla"] < sizes["gqa"] < sizes["mha"]


def test_parts_add_up_to_the_total(v3: ModelConfig, tiny: ModelConfig) -> None:
    for config in (v3, tiny, dataclasses.replace(tiny, q_lora_rank=None, tie_word_embeddings=True)):
        assert sum(count.parts(config).values()) == count.parameters(config).total


def test_latents_take_the_bytes_of_the_served_formats(v3: ModelConfig) -> None:
    per_layer = {kind: size // v3.num_hidden_layers for kind, size in count.latent_bytes_per_token(v3).items()}
    assert per_layer == {"BF16": 1152, "FP8": 656, "6-bit": 528}


@pytest.mark.parametrize(
    ("layers", "width", "scale"), [(8, 512, 352e6), (24, 2048, 9.66e9), (80, 8192, 419e9)], ids=str
)
def test_model_scale_equals_the_published_table(tiny: ModelConfig, layers: int, width: int, scale: float) -> None:
    config = dataclasses.replace(tiny, num_hidden_layers=layers, hidden_size=width)
    assert count.model_scale(config, 4096) == pytest.approx(scale, rel=2e-3)
