"""Counters on vLLM's Prometheus registry and in its log line, and that they agree with ``diffusion_stats``."""

import logging

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from vllm_twotower import diffusion_params


def test_prometheus_and_the_log_line_agree_with_diffusion_stats(tiny_moe, caplog):
    cases = tiny_moe.cases(16)[3:8]
    params = [golden_params(c) for c in cases]
    params.append(diffusion_params(mode="mock_ar", temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False))
    with start_engine(
        tiny_moe.path, {"passes_per_step": 3}, disable_log_stats=False, logprobs_mode="raw_logprobs"
    ) as e:
        e.tokens([*[c["prompt"] for c in cases], cases[0]["prompt"]], params)
        stats = e.stats(reset=False)
        metrics = {m.name: m for m in e.llm.get_metrics() if "twotower" in m.name}
        for name in ("canvases", "denoise_passes", "context_passes", "committed_tokens"):
            assert metrics[f"vllm:twotower_{name}"].value == stats[name], name
        histogram = metrics["vllm:twotower_passes_per_canvas"]
        assert histogram.count == stats["canvases"]
        assert histogram.sum == sum(c["nfe"] for c in cases)
        assert stats["denoise_passes"] == sum(c["nfe"] for c in cases) + 4
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
