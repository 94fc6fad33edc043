"""Self-speculation on the demo model's held-out questions, in engines of their own: rounds, pressure, bf16."""

import pytest

from benchmarks.quality_parts.questions import held_out
from tests.harness.engine import start_engine
from tests.test_self_speculation import SPECULATING, params
from tests.test_self_speculation_sampling import ask
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.decoding.drafts import HINT_THRESHOLD
from vllm_twotower.oracle.plain_towers import PlainTwoTower
from vllm_twotower.oracle.self_speculation import SelfSpeculation


def test_rounds_are_the_oracles():
    """Draft by draft: the same number of rounds, and as many accepted; what is counted adds up to what came out."""
    towers = PlainTwoTower.load(DEMO_MODEL)
    asked = params("self_speculation", max_tokens=64, ignore_eos=False)
    # a canvas is not cut at a block of states here, as the oracle cuts none
    with start_engine(DEMO_MODEL, SPECULATING, skip_tokenizer_init=False, enable_prefix_caching=False) as e:
        for item in held_out(1):
            prompt = e.llm.get_tokenizer().encode(item.prompt)
            oracle = towers.speculate(prompt, 64, SelfSpeculation(eos_token_id=2, hint_threshold=HINT_THRESHOLD))
            (tokens,) = e.tokens([prompt], asked)
            assert tokens == list(oracle.token_ids)
            stats = e.stats()
            assert stats["drafts"] == len(oracle.rounds)
            assert stats["accepted_tokens"] == sum(one.num_accepted for one in oracle.rounds)
            assert stats["denoise_forwards"] == stats["denoise_steps"] == stats["drafts"]


def test_answers_in_bf16_are_ars():
    """A CPU with bf16 instructions packs weights in place, which a verification must not read. These answers are sure,
    so that rounding decides nothing."""
    with start_engine(DEMO_MODEL, SPECULATING, skip_tokenizer_init=False, dtype="bfloat16") as e:
        prompts = [e.llm.get_tokenizer().encode(item.prompt) for item in held_out(1)]
        assert ask(e, "self_speculation", prompts, 0.0) == ask(e, "ar", prompts, 0.0)
        stats = e.stats()
        assert stats["accepted_tokens"] > 0.3 * stats["draft_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 48, "max_num_seqs": 16},
        {"max_num_batched_tokens": 50, "max_num_seqs": 16},
        {"num_gpu_blocks_override": 24},
    ],
    ids=["no prefix caching", "48 tokens a step", "50 tokens a step", "preemption"],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_held_out_questions_under_pressure(settings, temperature):
    with start_engine(DEMO_MODEL, SPECULATING, skip_tokenizer_init=False, **settings) as e:
        prompts = [e.llm.get_tokenizer().encode(item.prompt) for item in held_out(16 if not temperature else 6)]
        if "num_gpu_blocks_override" in settings:  # all grow out of their first block
            prompts = [(8 * prompt)[-120:] for prompt in prompts]
        expected = ask(e, "ar", prompts, temperature)
        e.num_preemptions = 0
        assert ask(e, "self_speculation", prompts, temperature) == expected
        assert (e.num_preemptions > 0) == ("num_gpu_blocks_override" in settings)
