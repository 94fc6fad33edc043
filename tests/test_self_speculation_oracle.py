"""The plain algorithm over the demo model's plain towers: AR's own tokens, whatever drafts them."""

import random

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.quality_parts.questions import held_out
from benchmarks.self_speculation import StoppingSpeculation
from tests.demo_questions import OPEN
from tests.tolerances import REPLAY
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.core import MASK_TOKEN_ID
from vllm_twotower.oracle.logits_rules import LogitsRules
from vllm_twotower.oracle.plain_towers import ContextCache, PlainTwoTower
from vllm_twotower.oracle.reference import choose_token
from vllm_twotower.oracle.self_speculation import AR_PASS, SelfSpeculation

EOS = 2
MAX_TOKENS = 24
HINTS = {"hint_threshold": 0.95}
PROSE = [
    OPEN,
    "And it came to pass in those days, that the king of the north",
    "The following functions return a new iterator over the items of",
]
"""The model is sure of nothing here, so most drafts are wrong, and 16 passes are 16 passes."""
NUM_QUESTIONS, PROSE_TOKENS = 11, 8
ADAPTIVE = {"stop_above": 10.0, "stop_below": 2.5}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return PlainTwoTower.load(DEMO_MODEL)


@pytest.fixture(scope="module")
def prompts():
    """A question of each family, and prose: tokens, and how many more are wanted."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    texts = {item.prompt: MAX_TOKENS for item in held_out(1)} | dict.fromkeys(PROSE, PROSE_TOKENS)
    assert len(texts) == NUM_QUESTIONS + len(PROSE)
    return [(tokenizer.encode(text).ids, max_tokens) for text, max_tokens in texts.items()]


@torch.inference_mode()
def ar(model, prompt, max_tokens, settings):
    """One forward of the context tower per token."""
    cache, new, tokens = ContextCache(), prompt, []
    while len(tokens) < max_tokens and settings.eos_token_id not in tokens:
        logits_V = model.context_logits(model.extend_context(torch.tensor([new]), cache)[:, -1:])[0, 0]
        logits_V = settings.rules.process(logits_V, prompt, tokens)
        tokens.append(choose_token(logits_V, len(prompt) + len(tokens), AR_PASS, settings))
        new = tokens[-1:]
    return tuple(tokens)


@pytest.fixture(scope="module")
def expected(model, prompts):
    """AR's tokens, by temperature."""
    settings = lambda t, seed: SelfSpeculation(temperature=t, seed=seed, eos_token_id=EOS)
    return {t: [ar(model, *prompt, settings(t, seed)) for seed, prompt in enumerate(prompts)] for t in (0.0, 0.8)}


def test_noise_changes_what_is_written(expected):
    assert sum(a != b for a, b in zip(expected[0.0], expected[0.8], strict=True)) == 3, "of the prose"
    assert len({tokens[-1] == EOS for tokens in expected[0.0]}) == 2, "some end by themselves"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("stop", [{}, ADAPTIVE], ids=["whole drafts", "adaptive stop"])
@pytest.mark.parametrize("hints", [{}, HINTS], ids=["no hints", "hints"])
@pytest.mark.parametrize("max_steps", [1, 3, 16])
def test_tokens_are_ars(model, prompts, expected, temperature, max_steps, hints, stop):
    for seed, (prompt, tokens) in enumerate(zip(prompts, expected[temperature], strict=True)):
        settings = StoppingSpeculation(
            max_steps=max_steps, temperature=temperature, seed=seed, eos_token_id=EOS, **hints, **stop
        )
        result = model.speculate(*prompt, settings)
        assert result.token_ids == tokens
        assert all(1 <= one.num_passes <= max_steps for one in result.rounds)
        # what the rounds report is what was written, up to where the request ended
        written = [tokens[0]]
        for one in result.rounds:
            assert one.canvas[0] == written[-1], "the newest token is known"
            accepted = one.canvas[1 : one.num_accepted + 1]
            written += [*accepted, *tokens[len(written) + len(accepted) :][:1]]
        assert tuple(written[: len(tokens)]) == tokens


def test_sampling_parameters_are_honoured_as_in_ar(model, prompts):
    rules = LogitsRules(
        repetition_penalty=1.2, presence_penalty=0.3, min_tokens=8, stop_token_ids=[EOS], top_k=20, top_p=0.9,
        bad_words=[[300], [40, 41]], logit_bias={350: 2.0},
    )  # fmt: skip
    for seed, prompt in enumerate(prompts):
        settings = SelfSpeculation(temperature=1.0, seed=seed, eos_token_id=EOS, rules=rules)
        assert model.speculate(*prompt, settings).token_ids == ar(model, *prompt, settings)


def rounds_with(model, prompts, expected, monkeypatch, draft):
    """All rounds where ``draft(tokens of AR, index of the first draft)`` stands in for the denoiser."""
    rounds = []
    for (prompt, max_tokens), tokens in list(zip(prompts, expected[0.0], strict=True))[::2]:
        follows = [*tokens, *[EOS] * 16]

        def denoise(canvas_BS, level_B, cache, prompt=prompt, follows=follows):
            known = next(iter(cache.attention.values())).keys_BJLd.shape[2] - len(prompt)
            logits_BSV = torch.zeros(*canvas_BS.shape, model.shape.vocab_size)
            wanted = [0, *draft(follows, known + 1, canvas_BS.shape[1] - 1)]
            return logits_BSV.scatter(2, torch.tensor(wanted)[None, :, None], 9.0)

        monkeypatch.setattr(model, "denoise", denoise)
        result = model.speculate(prompt, max_tokens, SelfSpeculation(eos_token_id=EOS))
        assert result.token_ids == tokens
        rounds += result.rounds[:-1]  # the last one may be cut by the end
    return rounds


def test_random_drafts_cost_nothing_but_time(model, prompts, expected, monkeypatch):
    rng = random.Random(0)
    draft = lambda follows, at, count: [rng.randrange(4, model.shape.vocab_size) for _ in range(count)]
    rounds = rounds_with(model, prompts, expected, monkeypatch, draft)
    assert sum(one.num_accepted for one in rounds) <= 0.02 * len(rounds), "one token a round, AR's own"


def test_an_oracles_drafts_are_all_accepted(model, prompts, expected, monkeypatch):
    rounds = rounds_with(model, prompts, expected, monkeypatch, lambda follows, at, count: follows[at : at + count])
    assert rounds
    assert all(one.num_accepted == 15 for one in rounds)


@pytest.mark.parametrize("wrong", [0, 1, 14])
def test_drafts_are_accepted_up_to_the_first_wrong_one(model, prompts, expected, monkeypatch, wrong):
    def draft(follows, at, count):
        right = list(follows[at : at + count])
        return [*right[:wrong], right[wrong] + 1 if right[wrong] + 1 != MASK_TOKEN_ID else 7, *right[wrong + 1 :]]

    rounds = rounds_with(model, prompts, expected, monkeypatch, draft)
    assert rounds
    assert all(one.num_accepted == wrong for one in rounds)


def test_hints_and_adaptive_stop_save_forwards_and_are_off_by_default(model, prompts):
    def forwards(**settings):
        whole = StoppingSpeculation(eos_token_id=EOS, **settings)
        results = [model.speculate(prompt, 96, whole) for prompt, _ in prompts[:NUM_QUESTIONS:2]]
        return sum(r.num_denoise_passes + len(r.rounds) for r in results)

    assert forwards() == forwards(hint_threshold=1.0) == forwards(stop_above=15.0, stop_below=0.0)
    assert forwards(**HINTS) < forwards()
    three = {"max_steps": 3, "confidence_threshold": 0.9, "hint_threshold": 0.8}
    assert forwards(**three, **ADAPTIVE) < forwards(**three)


@torch.inference_mode()
def test_replay_is_a_forward_over_exactly_those_tokens(model, prompts):
    for prompt, _ in prompts[::3]:
        before, canvas = ContextCache(), prompt[-16:]
        model.extend_context(torch.tensor([prompt[:-16]]), before)
        logits_BSV, kept = model.verify(torch.tensor([canvas]), before)
        for num_tokens in range(1, 17):
            replayed, exact = (ContextCache(dict(before.attention), dict(before.mamba)) for _ in range(2))
            model.replay(kept, replayed, num_tokens)
            hidden_BSD = model.extend_context(torch.tensor([canvas[:num_tokens]]), exact)
            assert_close(logits_BSV[:, num_tokens - 1], model.context_logits(hidden_BSD[:, -1]))
            for index, layer in exact.attention.items():
                assert_close(replayed.attention[index].keys_BJLd, layer.keys_BJLd)
                assert_close(replayed.attention[index].values_BJLd, layer.values_BJLd)
            for index, state in exact.mamba.items():
                assert_close(replayed.mamba[index].conv_BKC, state.conv_BKC)
                assert_close(replayed.mamba[index].ssm_BHPN, state.ssm_BHPN)


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) < REPLAY
