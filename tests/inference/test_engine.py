import dataclasses
import math
import random

import pytest
import torch

from benthic.base.errors import BenthicError, DoesNotFit, InputError
from benthic.inference.chance import draw
from benthic.inference.config import EngineConfig, SamplingParams, sample_seed
from benthic.inference.engine import Engine
from benthic.inference.request import Request
from benthic.model.transformer import Transformer

GREEDY = SamplingParams(max_tokens=16, temperature=0)
CROWDED = EngineConfig(max_num_seqs=7, max_num_batched_tokens=24, max_model_len=72, page_size=4, num_pages=40)


@torch.inference_mode()
def recomputed(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Plain greedy decoding: the whole sequence through the expanded model for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def answers(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def run(engine: Engine, ids: list[int]) -> dict[int, list[int]]:
    tokens = {}
    while engine.busy:
        tokens |= {output.request_id: output.token_ids for output in engine.step().outputs}
    return {i: tokens[i] for i in ids}


def test_cached_decoding_equals_recomputing_everything_for_every_token(model, prompts):
    outputs = Engine(model, None).generate(prompts, GREEDY)
    assert answers(outputs) == [recomputed(model, prompt, 16) for prompt in prompts]
    assert [output.prompt_token_ids for output in outputs] == prompts


def test_an_answer_in_company_is_the_answer_alone(model, prompts):
    params = [SamplingParams(max_tokens=20, temperature=i % 3 * 0.7, top_k=i % 5, seed=i) for i in range(24)]
    alone = [Engine(model, None).generate([prompt], p)[0] for prompt, p in zip(prompts, params)]
    together = Engine(model, None).generate(prompts, params)
    assert answers(together) == answers(alone)
    for a, b in zip(together, alone):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_preemption_and_prompts_in_pieces_change_no_answer(model, prompts):
    params = [SamplingParams(max_tokens=30, temperature=i % 2, seed=i) for i in range(24)]
    engine = Engine(model, None, CROWDED)
    crowded = engine.generate(prompts, params)
    assert engine.stats.preemptions > 10
    assert answers(crowded) == answers(Engine(model, None).generate(prompts, params))


def test_random_arrivals_and_aborts_change_no_answer(model, prompts):
    params = [SamplingParams(max_tokens=20, temperature=i % 2, seed=i) for i in range(24)]
    undisturbed = answers(Engine(model, None).generate(prompts, params))
    for seed in range(3):
        rng = random.Random(seed)
        engine, ids, aborted, tokens = Engine(model, None, CROWDED), {}, set(), {}
        for i in rng.sample(range(24), 24):
            ids[engine.add(Request(prompt_token_ids=prompts[i], params=params[i]))] = i
            if rng.random() < 0.2:
                aborted.add(victim := rng.choice(list(ids)))
                engine.abort(victim)
            for _ in range(rng.randrange(4)):
                tokens |= {o.request_id: o for o in engine.step().outputs}
        while engine.busy:
            tokens |= {o.request_id: o for o in engine.step().outputs}
        assert tokens.keys() == ids.keys()
        for request_id, output in tokens.items():
            whole = undisturbed[ids[request_id]]
            if output.finish_reason == "abort":
                assert request_id in aborted
                assert output.token_ids == whole[: len(output.token_ids)]
            else:
                assert output.token_ids == whole
        assert len(engine.scheduler.pool.free) == CROWDED.num_pages


@pytest.mark.parametrize("speculative", [0, 1, 3])
def test_what_is_not_owned_is_never_read(model, prompts, speculative):
    """Every slot outside running requests' tokens and cached pages holds NaN before each step, and nothing changes."""
    config = EngineConfig(num_speculative_tokens=speculative, max_model_len=72, page_size=4, num_pages=60)
    undisturbed = answers(Engine(model, None, config).generate(prompts, GREEDY))
    engine = Engine(model, None, config)
    ids = [engine.add(Request(prompt_token_ids=prompt, params=GREEDY)) for prompt in prompts]
    tokens = {}
    while engine.busy:
        poison(engine)
        tokens |= {output.request_id: output.token_ids for output in engine.step().outputs}
    assert [tokens[i] for i in ids] == undisturbed
    assert engine.stats.preemptions > 0


def poison(engine: Engine) -> None:
    layers, size = engine.runner.cache.layers, engine.config.page_size
    keep = torch.zeros(len(layers[0].c_kv), dtype=torch.bool)
    for seq in engine.scheduler.running:
        keep[[seq.pages[i // size] * size + i % size for i in range(seq.computed)]] = True
    for page in engine.scheduler.pool.findable:
        keep[page * size : (page + 1) * size] = True
    for layer in layers:
        layer.c_kv[~keep], layer.k_rope[~keep] = math.nan, math.nan


@pytest.mark.parametrize("temperature", [0, 1])
def test_poison_where_it_is_read_is_noticed(model, prompts, temperature):
    """Negative control: NaN in an owned slot surfaces as an error."""
    engine = Engine(model, None)
    engine.add(Request(prompt_token_ids=prompts[0], params=SamplingParams(temperature=temperature)))
    engine.step()
    for layer in engine.runner.cache.layers:
        layer.c_kv[engine.config.page_size] = math.nan
    with pytest.raises(BenthicError, match="not finite"):
        engine.step()
    engine.abort(0)
    assert [output.finish_reason for output in engine.step().outputs] == ["abort"]
    assert answers(engine.generate(prompts[:2], GREEDY)) == [recomputed(model, prompt, 16) for prompt in prompts[:2]]


def test_each_token_is_drawn_with_the_numbers_of_its_seed_and_place(model, prompts):
    params = SamplingParams(max_tokens=12, temperature=1.5, seed=8)
    for output in Engine(model, None).generate(prompts[:6], params):
        ids = torch.tensor([output.prompt_token_ids + output.token_ids])
        begin = len(output.prompt_token_ids)
        with torch.inference_mode():
            logits = model(ids)[0, begin - 1 : -1]  # [12, V]
        weights = ((logits - logits.amax(-1, keepdim=True)) / 1.5).exp() * 2.0**44
        places = torch.arange(begin, ids.shape[1])
        assert output.token_ids == draw(weights.long(), torch.full_like(places, 8), places).tolist()


def test_an_answer_goes_on_from_its_beginning_as_if_it_had_never_stopped(model, prompts):
    """Numbers belong to places: the answer so far can be given as the end of the prompt."""
    whole = Engine(model, None).generate(prompts[:6], SamplingParams(max_tokens=20, seed=3))
    begun = [prompt + output.token_ids[:8] for prompt, output in zip(prompts, whole)]
    rest = Engine(model, None).generate(begun, SamplingParams(max_tokens=12, seed=3))
    assert [output.token_ids[8:] for output in whole] == answers(rest)


def test_logprobs_are_those_of_the_untempered_model(model, prompts):
    hot = SamplingParams(max_tokens=8, temperature=2.0, top_k=5, top_p=0.8, seed=3)
    for output in Engine(model, None).generate(prompts[:8], hot):
        ids = torch.tensor([output.prompt_token_ids + output.token_ids])
        with torch.inference_mode():
            every = model(ids).log_softmax(-1)[0, len(output.prompt_token_ids) - 1 : -1]
        own = every.gather(1, torch.tensor(output.token_ids)[:, None]).squeeze(1).tolist()
        assert output.logprobs == pytest.approx(own, abs=1e-4)


def test_changed_weights_take_effect_in_the_next_call(model, prompts):
    engine = Engine(model, None)
    before = answers(engine.generate(prompts[:4], GREEDY))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
        model.layers[1].self_attn.kv_b_proj.weight.mul_(1.5)
    engine.update_weights()
    after = answers(engine.generate(prompts[:4], GREEDY))
    assert after != before
    assert after == [recomputed(model, prompt, 16) for prompt in prompts[:4]]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_cached_prefixes_change_no_answer(model, prompts):
    config = EngineConfig(page_size=4, max_num_batched_tokens=32, num_pages=60)
    shared = [prompts[i % 3][:8] + prompts[i][: i % 7] for i in range(24)]
    params = [SamplingParams(max_tokens=12, temperature=i % 2, seed=i) for i in range(24)]
    plain = Engine(model, None, dataclasses.replace(config, enable_prefix_caching=False))
    cached = Engine(model, None, config)
    expected = answers(plain.generate(shared, params))
    assert [answers(cached.generate(shared, params)) for _ in range(2)] == [expected, expected]
    assert cached.stats.prefill_tokens < plain.stats.prefill_tokens * 2 * 0.6


def test_outputs_say_how_much_of_their_prompt_was_cached(model, prompts):
    engine = Engine(model, None, EngineConfig(page_size=4))
    for tokens, expected in ((17, 0), (17, 16), (16, 12), (3, 0)):  # whole pages; a token is left to compute
        (output,) = engine.generate([max(prompts, key=len)[:tokens]], SamplingParams(max_tokens=2))
        assert output.num_cached_tokens == expected


def test_samples_after_the_first_compute_little_of_their_prompt(model, prompts):
    engine = Engine(model, None, EngineConfig(page_size=4, max_num_batched_tokens=40))
    longest = max(prompts, key=len)
    engine.generate([longest], SamplingParams(max_tokens=2, n=8))
    assert engine.stats.prefill_tokens <= 2 * len(longest) + 6 * 4  # the second began beside the first


def test_samples_of_a_prompt_have_their_own_documented_seeds(model, prompts):
    many = Engine(model, None).generate(prompts[:3], SamplingParams(max_tokens=12, seed=5, n=4))
    assert len({tuple(output.token_ids) for output in many}) == 12
    for k in range(4):
        single = SamplingParams(max_tokens=12, seed=sample_seed(5, k))
        assert answers(Engine(model, None).generate(prompts[:3], single)) == answers(many[k::4])


def test_a_stop_token_ends_the_answer_and_belongs_to_it(model, prompts):
    free = Engine(model, None).generate(prompts[:1], GREEDY)[0]
    stop = free.token_ids[5]
    at = free.token_ids.index(stop)
    params = SamplingParams(max_tokens=16, temperature=0, stop_token_ids=(stop,))
    output = Engine(model, None).generate(prompts[:1], params)[0]
    assert (free.finish_reason, output.finish_reason) == ("length", "stop")
    assert output.token_ids == free.token_ids[: at + 1]
    assert len(output.logprobs) == at + 1


def test_deltas_add_up_to_outputs(model, prompts):
    engine = Engine(model, None, EngineConfig(max_model_len=50, page_size=4))
    engine.generate(prompts[:1], SamplingParams(max_tokens=1))
    engine.add(Request(prompt_token_ids=prompts[0], params=SamplingParams(max_tokens=100, temperature=0, logprobs=2)))
    tokens, scores, reasons, outputs, tops, cached = [], [], [], [], [], set()
    while engine.busy:
        step = engine.step()
        outputs += step.outputs
        for delta in step.deltas:
            tokens += delta.token_ids
            scores += delta.logprobs
            tops += delta.tops
            cached.add(delta.num_cached_tokens)
            reasons.append(delta.finish_reason)
    (output,) = outputs
    assert (tokens, scores, tops) == (output.token_ids, output.logprobs, output.top_logprobs)
    assert [len(top) for top in tops] == [2] * len(tokens)
    assert cached == {output.num_cached_tokens} != {0}
    assert reasons == [""] * (len(tokens) - 1) + ["length"]
    assert len(prompts[0]) + len(tokens) == 50


def test_an_abort_frees_pages_at_once_and_is_reported_once(model, prompts):
    engine = Engine(model, None, EngineConfig(max_num_seqs=2, max_model_len=64))
    ids = [engine.add(Request(prompt_token_ids=prompt, params=GREEDY)) for prompt in prompts[:3]]
    engine.step()
    used = len(engine.scheduler.pool.free)
    engine.abort(ids[0])  # running
    engine.abort(ids[2])  # waiting
    assert len(engine.scheduler.pool.free) > used
    step = engine.step()
    assert [(o.request_id, o.finish_reason) for o in step.outputs] == [(ids[0], "abort"), (ids[2], "abort")]
    engine.abort(ids[0])
    assert run(engine, [ids[1]]) == {ids[1]: recomputed(model, prompts[1], 16)}
    assert len(engine.scheduler.pool.free) == engine.config.num_pages
    assert engine.step() == ([], [])
    with pytest.raises(InputError, match="request 99 does not exist"):
        engine.abort(99)


def test_an_interrupted_generate_leaves_a_usable_engine(model, prompts):
    engine = Engine(model, None)

    def interrupt(done: int, total: int) -> None:
        if engine.stats.steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, GREEDY, interrupt)
    assert not engine.busy
    assert len(engine.scheduler.pool.free) == engine.config.num_pages
    assert answers(engine.generate(prompts[:2], GREEDY)) == [recomputed(model, prompt, 16) for prompt in prompts[:2]]


def test_progress_counts_finished_samples(model, prompts):
    seen = []
    params = SamplingParams(max_tokens=4, n=2)
    Engine(model, None).generate(prompts[:3], params, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 6), (0, 6), (0, 6), (6, 6)]


class Letters:
    """A tokenizer of letters; the end of sentence is token 1."""

    eos_id = 1

    def __init__(self, vocab_size: int = 64):
        self.vocab_size = vocab_size

    def decode(self, ids, skip_special: bool = False) -> str:
        return "".join(chr(65 + i) for i in ids if not (skip_special and i == self.eos_id))


def test_a_tokenizer_gives_text_and_the_end_of_sentence(model, prompts):
    with torch.no_grad():
        model.lm_head.weight[1] *= 3
    outputs = Engine(model, Letters()).generate(prompts, SamplingParams(max_tokens=40, seed=1))
    stopped = [output for output in outputs if output.finish_reason == "stop"]
    assert stopped
    assert all(output.token_ids.index(1) == len(output.token_ids) - 1 for output in stopped)
    assert all(output.text == Letters().decode(output.token_ids, skip_special=True) for output in outputs)


def test_ids_that_the_tokenizer_lacks_are_never_chosen(model, prompts):
    with torch.no_grad():
        model.lm_head.weight[60:] *= 5
    params = [SamplingParams(max_tokens=12, temperature=i % 2, seed=i) for i in range(24)]
    prompts = [[token % 60 for token in prompt] for prompt in prompts]
    config = EngineConfig(num_speculative_tokens=1)
    unbounded, bounded = (Engine(model, t, config).generate(prompts, params) for t in (None, Letters(60)))
    assert max(map(max, answers(unbounded))) >= 60 > max(map(max, answers(bounded)))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "prompt_token_ids=\\[\\]"),
        ("text", SamplingParams(), "prompt_token_ids='text'"),
        ([1] * 96, SamplingParams(), "has 96 tokens, max_model_len=96 -> use at most 95"),
        ([3, 64], SamplingParams(), "prompt_token_ids\\[1\\]=64 .* from 0 to 63"),
        ([-1], SamplingParams(), "prompt_token_ids\\[0\\]=-1"),
        ([True], SamplingParams(), "prompt_token_ids\\[0\\]=True"),
        ([1.0], SamplingParams(), "prompt_token_ids\\[0\\]=1.0"),
        ([1], SamplingParams(n=2), "n=2 in one request"),
    ],
)
def test_the_door_refuses(model, prompt, params, message):
    engine = Engine(model, None)
    with pytest.raises(InputError, match=message):
        engine.add(Request(prompt_token_ids=prompt, params=params))
    assert not engine.busy


def test_a_bad_prompt_among_many_leaves_nothing_behind(model, prompts):
    engine = Engine(model, None)
    with pytest.raises(InputError, match="=64"):
        engine.generate([*prompts, [64]], GREEDY)
    with pytest.raises(InputError, match="1 sampling params for 24 prompts"):
        engine.generate(prompts, [GREEDY])
    assert not engine.busy


def test_generate_does_not_mix_with_unfinished_requests(model, prompts):
    engine = Engine(model, None)
    engine.add(Request(prompt_token_ids=[1], params=GREEDY))
    with pytest.raises(BenthicError, match="unfinished"):
        engine.generate(prompts, GREEDY)


def test_a_cache_that_cannot_be_had_names_what_to_lower(model):
    with pytest.raises(DoesNotFit, match=r"num_pages=2000000000 .* -> lower max_num_seqs"):
        Engine(model, None, EngineConfig(num_pages=2_000_000_000, page_size=1024))


def test_a_quantised_cache_is_refused_where_the_latent_cannot_be_cut(model):
    with pytest.raises(InputError, match="kv_cache_dtype='int6' with kv_lora_rank=16"):
        Engine(model, None, EngineConfig(kv_cache_dtype="int6"))
