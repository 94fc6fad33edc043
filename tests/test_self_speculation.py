"""Self-speculation in the engine: AR's own tokens, whatever is drafted, scheduled, preempted or sampled."""

import pytest
import torch
import vllm.envs

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from vllm_twotower import diffusion_params

SPECULATING = {"draft_policy": "always"}


def params(mode, **more):
    return diffusion_params(mode=mode, detokenize=False, **{"temperature": 0.0, "ignore_eos": True, **more})


SETTINGS = {
    "as it is": {},
    "preemption": {"num_gpu_blocks_override": 14},
    "no prefix caching": {"enable_prefix_caching": False},
    "50 tokens a step": {"max_num_batched_tokens": 50, "max_num_seqs": 16},
    "compiled and profiled": {"enforce_eager": False},
}
FAST = 2


@pytest.mark.parametrize(
    "settings",
    [pytest.param(s, marks=[pytest.mark.slow] * (i >= FAST), id=n) for i, (n, s) in enumerate(SETTINGS.items())],
)
@pytest.mark.parametrize("max_steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_nvidias_ar_tokens(tiny_moe, settings, max_steps):
    cases = tiny_moe.ar[3:]
    with start_engine(tiny_moe.path, SPECULATING, **settings) as e:
        asked = params("self_speculation", max_tokens=20, max_steps=max_steps)
        outputs = e.tokens([c["prompt"] for c in cases], asked, 3000)
        assert outputs == [c["output"][:20] for c in cases]
        if settings.get("enforce_eager", True):  # a compiled tower is not seen to run
            e.assert_one_tower_per_step()
        assert (e.num_preemptions > 0) == ("num_gpu_blocks_override" in settings)
        stats = e.stats()
        # the first token needs no draft, and at a block's end there is room for none
        assert stats["drafts"] + stats["accepted_tokens"] > 0.8 * 20 * len(cases)
        assert e.scheduler.kv_cache_manager.usage == pytest.approx(0)


class OracleDrafts:
    """In place of what was drafted: AR's own tokens, or others."""

    def __init__(self, e, answers, spoil=lambda tokens: tokens):
        self.state, self.answers, self.spoil = e.runner.model_state, answers, spoil
        self.take_drafts = self.state.canvases.take_drafts
        self.state.canvases.take_drafts = self

    def __call__(self, slots):
        drafts = self.take_drafts(slots)
        step = self.state.last_step
        for index, slot in enumerate(slots):
            row = step.slots.index(slot)
            prompt, answer = self.answers[step.req_ids[row].split("-")[0]]
            done = int(step.computed_np[row]) + 1 - len(prompt)
            right = torch.tensor(answer[done : done + drafts.shape[1]])
            drafts[index] = 0
            drafts[index, : len(right)] = self.spoil(right)
        return drafts


@pytest.mark.parametrize(
    "prefix_caching",
    [pytest.param(True, id="prefix caching"), pytest.param(False, id="none", marks=pytest.mark.slow)],
)
def test_drafts_by_an_oracle_around_every_boundary(tiny_moe, prefix_caching):
    """Canvases that begin at every place of a block, accepted whole, or but for the last token or the first."""
    longest = max((c["prompt"] for c in tiny_moe.ar), key=len)
    prompts = [longest[-n:] for n in range(97, 131)]
    asked = params("self_speculation", max_tokens=36)
    with start_engine(tiny_moe.path, SPECULATING, enable_prefix_caching=prefix_caching) as e:
        expected = e.tokens(prompts, params("ar", max_tokens=52), 2000)
        answers = {str(i): pair for i, pair in enumerate(zip(prompts, expected, strict=True))}
        answers_wanted = [tokens[:36] for tokens in expected]
        oracle = OracleDrafts(e, answers)
        e.stats()
        assert e.tokens(prompts, asked) == answers_wanted
        stats = e.stats()
        # the last round may be cut, and there is none of width 1
        assert stats["accepted_tokens"] == stats["draft_tokens"] > 30 * len(prompts)
        oracle.spoil = lambda tokens: torch.cat([tokens[:-1], (tokens[-1:] + 1) % 100])
        assert e.tokens(prompts, asked) == answers_wanted
        oracle.spoil = lambda tokens: torch.cat([(tokens[:1] + 1) % 100, tokens[1:]])
        e.stats()
        assert e.tokens(prompts[::4], asked, 2000) == answers_wanted[::4]
        assert e.stats()["accepted_tokens"] == 0


@pytest.mark.parametrize("settings", [{}, pytest.param({"num_gpu_blocks_override": 14}, marks=pytest.mark.slow)])
def test_the_host_knows_the_lengths_that_the_device_has(tiny_moe, settings):
    """Where FlashInfer plans attention on the host it goes by lengths that vLLM calls an upper bound. They are exact in
    every mode, also after drafts were accepted in part and after preemptions."""
    cases, modes = tiny_moe.ar[5:9], ["self_speculation", "mask_diffusion", "mock_ar", "ar"]
    on_device, on_host = [], []
    with start_engine(tiny_moe.path, SPECULATING, **settings) as e:
        state, answers = e.runner.model_state, {str(i): (c["prompt"], c["output"]) for i, c in enumerate(cases)}
        OracleDrafts(e, answers, lambda tokens: torch.cat([tokens[:3], (tokens[3:] + 1) % 100]))
        prepare_attn = state.prepare_attn

        def note_lengths(batch, *args, **kwargs):
            n = batch.num_reqs
            on_device.append([x.tolist() for x in (batch.seq_lens[:n], batch.query_start_loc[: n + 1])])
            on_host.append(
                [x.tolist() for x in (batch.seq_lens_cpu_upper_bound[:n], batch.query_start_loc_np[: n + 1])]
            )
            return prepare_attn(batch, *args, **kwargs)

        state.prepare_attn = note_lengths
        asked = [params(mode, max_tokens=20) for mode in modes for _ in cases]
        e.tokens([c["prompt"] for c in cases] * len(modes), asked, 1000)
        stats = e.stats()
        assert (e.num_preemptions > 0) == ("num_gpu_blocks_override" in settings)
    assert on_host == on_device
    assert 0 < stats["accepted_tokens"] < stats["draft_tokens"]


def cached_hashes(e):
    return set(e.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache)


def test_the_prefix_cache_never_holds_a_draft(tiny_moe):
    """Blocks that were filled while drafts were rejected in them have the hashes that AR's have, and are read again."""
    longest = max((c["prompt"] for c in tiny_moe.ar), key=len)
    # with blocks of 128 tokens: one is the prompt's, whose states vLLM keeps too; drafts are rejected in the second
    prompts = [longest[-n:] for n in (130, 150, 171)]
    hashes, outputs = {}, {}
    for mode in ("ar", "self_speculation"):
        with start_engine(tiny_moe.path, SPECULATING) as e:
            outputs[mode] = e.tokens(prompts, params(mode, max_tokens=150), 2000)
            hashes[mode] = cached_hashes(e)
            stats = e.stats()
            if mode == "self_speculation":
                assert stats["draft_tokens"] - stats["accepted_tokens"] > 1000, "rejected drafts"
                # a second request over that prefix equals a cold run
                longer = [p + tokens[:140] for p, tokens in zip(prompts, outputs["ar"], strict=True)]
                again = e.generate(longer, params("ar", max_tokens=10))
                assert all(o.num_cached_tokens >= 128 for o in again)
                assert [list(o.outputs[0].token_ids) for o in again] == [tokens[140:] for tokens in outputs["ar"]]
    assert outputs["self_speculation"] == outputs["ar"]
    assert hashes["self_speculation"] <= hashes["ar"]
    assert len(hashes["self_speculation"]) >= len(prompts)


def test_all_modes_in_one_batch(tiny_moe):
    diffusion, ar, mock_ar = tiny_moe.cases(16)[5:8], tiny_moe.ar[4:10], tiny_moe.mock_ar[5:7]
    cases = [*diffusion, *ar, *mock_ar]
    settings = [golden_params(c) for c in diffusion]
    settings += [params(mode, max_tokens=20) for mode in ["ar", "self_speculation"] * 3]
    settings += [params("mock_ar", max_tokens=10)] * 2
    with start_engine(tiny_moe.path, {**SPECULATING, "passes_per_step": 2}) as e:
        outputs = e.tokens([c["prompt"] for c in cases], settings, max_steps=300)
        assert outputs == [c["output"][: len(o)] for c, o in zip(cases, outputs, strict=True)]
        e.assert_one_tower_per_step()
        # what drafts left in the prefix cache is clean: continuations of the same prompts, from the cache
        longer = [c["prompt"] + c["output"][:16] for c in ar]
        again = e.tokens(longer, params("ar", max_tokens=4))
        assert again == [c["output"][16:20] for c in ar]


def test_up_to_the_longest_length(tiny_moe):
    """Every room that is left, across blocks of states and up to ``max_model_len``."""
    case = tiny_moe.ar[0]
    room = len(case["prompt"]) + len(case["output"])
    for max_model_len in (room - 1, room - 2, room - 7):
        with start_engine(tiny_moe.path, SPECULATING, max_model_len=max_model_len) as e:
            (tokens,) = e.tokens([case["prompt"]], params("self_speculation", max_tokens=1000))
            assert tokens == case["output"][: max_model_len - len(case["prompt"])]


def test_the_engine_option_is_every_requests_default(tiny_moe):
    case = tiny_moe.ar[1]
    plain = diffusion_params(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=24)
    with start_engine(tiny_moe.path, {**SPECULATING, "mode": "self_speculation"}) as e:
        assert e.tokens([case["prompt"]], plain) == [case["output"][:24]]
        assert e.stats()["drafts"] > 0


def test_no_drafts_where_nobody_reports_that_they_are_done(tiny_moe, monkeypatch):
    """VLLM_RAISE_ON_LOGIT_NANS takes the only channel from a worker to the scheduler."""
    case = tiny_moe.ar[1]
    with start_engine(tiny_moe.path, SPECULATING) as e:
        # not before: vLLM would count with a kernel that Triton's interpreter cannot run
        monkeypatch.setattr(vllm.envs, "VLLM_RAISE_ON_LOGIT_NANS", True)
        asked = params("self_speculation", max_tokens=24)
        assert e.tokens([case["prompt"]], asked) == [case["output"][:24]]
        assert e.stats()["drafts"] == 0


def test_the_policy_falls_back_to_ar_where_drafts_are_wrong(tiny_moe):
    """A random model's drafts are never right: after a few rounds the engine decodes as ``ar`` does."""
    case = tiny_moe.ar[2]
    with start_engine(tiny_moe.path) as e:
        (tokens,) = e.tokens([case["prompt"]], params("self_speculation", max_tokens=len(case["output"])))
        assert tokens == case["output"]
        assert 0 < e.stats()["drafts"] < len(tokens) / 3
