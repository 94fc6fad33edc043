"""Self-speculation on the demo model: every sampling parameter is AR's, and answers take few of AR's forwards."""

import pytest
from vllm.sampling_params import StructuredOutputsParams

from benchmarks.quality_parts.questions import held_out
from tests.demo_questions import LONG, OPEN, SHORT
from tests.harness.engine import start_engine
from tests.test_self_speculation import SPECULATING, params
from vllm_twotower.commands.cli import DEMO_MODEL

QUESTIONS = [LONG, SHORT, OPEN, "It is Monday. Move by days: -2 +3 +3 +5 -6 -1 -8\nAnswer:"]
SAMPLING = {
    "greedy": {},
    "temperature": {"temperature": 0.9, "seed": 7},
    "shaped": {"temperature": 0.8, "seed": 7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "processed": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "min_tokens": 8, "logit_bias": {12: 2.0}},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1},
}


@pytest.fixture(scope="module")
def demo():
    with start_engine(DEMO_MODEL, SPECULATING, skip_tokenizer_init=False) as e:
        yield e


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_every_sampling_parameter_is_ars(demo, sampling):
    tokenizer = demo.llm.get_tokenizer()
    prompts = [tokenizer.encode(text) for text in QUESTIONS]
    settings = {"max_tokens": 24, **sampling}
    expected = demo.generate(prompts, params("ar", **settings))
    demo.stats()
    outputs = demo.generate(prompts, params("self_speculation", **settings))
    for ours, ars in zip(outputs, expected, strict=True):
        assert ours.outputs[0].token_ids == ars.outputs[0].token_ids
        for mine, theirs in zip(ours.outputs[0].logprobs or (), ars.outputs[0].logprobs or (), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(mine[t].logprob == pytest.approx(theirs[t].logprob, abs=1e-4) for t in mine)
        assert (ours.prompt_logprobs is None) == ("logprobs" not in sampling)
    assert demo.stats()["accepted_tokens"] > 0, "else nothing is shown"


def ask(e, mode, prompts, temperature):
    """Answers, each with a seed of its own."""
    settings = [
        params(mode, max_tokens=96, ignore_eos=False, temperature=temperature, seed=i) for i in range(len(prompts))
    ]
    return e.tokens(prompts, settings, max_steps=5000)


@pytest.mark.parametrize(("temperature", "per_family", "least"), [(0.0, 16, 3.8), (0.7, 8, 3.7), (1.0, 8, 3.5)])
def test_held_out_questions_take_a_fraction_of_ars_forwards(demo, temperature, per_family, least):
    """Of either tower; the prompt's own forward is left out."""
    prompts = [demo.llm.get_tokenizer().encode(item.prompt) for item in held_out(per_family)]
    expected = ask(demo, "ar", prompts, temperature)
    demo.stats()
    assert ask(demo, "self_speculation", prompts, temperature) == expected
    stats = demo.stats()
    assert stats["denoise_passes"] == stats["drafts"]
    forwards = stats["denoise_passes"] + stats["context_passes"] - len(prompts)
    assert sum(map(len, expected)) / forwards > least


def test_structured_output_decodes_as_ar(demo):
    prompt = demo.llm.get_tokenizer().encode(SHORT)
    choice = StructuredOutputsParams(choice=["yes", "no"])
    texts = [
        demo.generate([prompt], params(mode, max_tokens=8, ignore_eos=False, structured_outputs=choice))[0].outputs[0]
        for mode in ("ar", "self_speculation")
    ]
    assert texts[0].token_ids == texts[1].token_ids
    assert demo.llm.get_tokenizer().decode(texts[1].token_ids, skip_special_tokens=True) in ("yes", "no")
