"""Counters on vLLM's Prometheus registry and in its log line, and that they agree with ``diffusion_stats``."""

import logging

from tests.demo_questions import SHORT
from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from tests.test_self_speculation import SPECULATING, params
from vllm_twotower import diffusion_params
from vllm_twotower.commands.cli import DEMO_MODEL


def test_prometheus_and_the_log_line_agree_with_diffusion_stats(tiny_moe, caplog):
    cases = tiny_moe.cases(16)[3:8]
    asked = [golden_params(c) for c in cases]
    asked.append(diffusion_params(mode="mock_ar", temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False))
    with start_engine(
        tiny_moe.path, {"passes_per_step": 3}, disable_log_stats=False, logprobs_mode="raw_logprobs"
    ) as e:
        e.tokens([*[c["prompt"] for c in cases], cases[0]["prompt"]], asked)
        stats = e.stats(reset=False)
        metrics = {m.name: m for m in e.llm.get_metrics() if "twotower" in m.name or "diffusion" in m.name}
        for name in ("canvases", "denoise_passes", "context_passes", "committed_tokens"):
            assert metrics[f"vllm:twotower_{name}"].value == stats[name], name
        histogram = metrics["vllm:twotower_passes_per_canvas"]
        assert histogram.count == stats["canvases"]
        assert histogram.sum == sum(c["nfe"] for c in cases)
        assert stats["denoise_passes"] == sum(c["nfe"] for c in cases) + 4
        # vLLM's names for a diffusion model's, where a commit is a step too
        steps, tokens = histogram.sum + histogram.count, stats["committed_tokens"] - 4
        assert metrics["vllm:diffusion_num_denoising_steps"].value == steps
        assert metrics["vllm:diffusion_num_committed_tokens"].value == tokens == 16 * histogram.count
        assert metrics["vllm:diffusion_num_canvas_positions"].value == 16 * steps
        caplog.set_level(logging.INFO)
        logging.getLogger("vllm").propagate = True
        logging.getLogger("vllm.twotower").setLevel(logging.INFO)
        from vllm_twotower.runtime import stat_loggers

        line = stat_loggers.DiffusionLogging()
        line.observe(stat_loggers.StepCounts(2, 8, 3, 32, [3, 5]))
        line.log()
        line.log()
        said = [r.getMessage() for r in caplog.records if "Diffusion metrics" in r.getMessage()]
    assert set(said) == {
        "Diffusion metrics: Mean passes per canvas: 4.00, Tokens per denoise pass: 4.00, Committed: 32 tokens, "
        "Canvases: 2, Denoise passes: 8, Context passes: 3"
    }


def test_drafts_are_counted_in_vllms_own_words(caplog):
    """On the demo model, whose drafts are mostly right; canvases are those of mask diffusion only."""
    logging.getLogger("vllm").propagate = True
    caplog.set_level(logging.INFO, logger="vllm")
    settings = {"disable_log_stats": False, "skip_tokenizer_init": False}
    with start_engine(DEMO_MODEL, SPECULATING, **settings) as e:
        prompt = e.llm.get_tokenizer().encode(SHORT)
        (tokens,) = e.tokens([prompt], params("self_speculation", max_tokens=30))
        stats = e.stats()
        metrics = {m.name: m for m in e.llm.get_metrics() if "spec_decode" in m.name}
        for name in ("drafts", "draft_tokens", "accepted_tokens"):
            assert metrics[f"vllm:spec_decode_num_{name}"].value == stats[name] > 0
        by_position = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        assert sum(by_position) == stats["accepted_tokens"]
        assert by_position[0] == max(by_position)
        assert stats["accepted_tokens"] + stats["drafts"] >= len(tokens) - 1
        assert stats["canvases"] == stats["committed_tokens"] == 0
        assert stats["denoise_passes"] == stats["drafts"]
        e.llm.llm_engine.logger_manager.log()
    said = [r.getMessage() for r in caplog.records if "SpecDecoding metrics" in r.getMessage()]
    assert len(said) == 1
    assert f"Accepted: {stats['accepted_tokens']} tokens, Drafted: {stats['draft_tokens']} tokens" in said[0]
