"""Captured denoise passes and steps that read once: the same tokens as layer by layer and pass by pass.

There is no CUDA here. What is tested is everything but the capture itself: the buffers, their padding, the choice of a
captured size, the host's copy of what is masked. The recorder repeats the pass on the buffers instead of replaying it.
"""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from vllm_twotower import diffusion_params
from vllm_twotower.runtime import denoise_graphs
from vllm_twotower.runtime.denoise_loop import DenoiseLoop

SIZES = [1, 2, 4, 8, 4096]
"""``cudagraph_capture_sizes``; there is no room for the last."""


class Recorder:
    """Repeats a pass; counts how often, by number of rows."""

    def __init__(self):
        self.num_replays = {}

    def __call__(self, context, run):
        rows = len(run.args[2])
        self.num_replays[rows] = 0
        recorded = weakref.ref(run)  # a graph keeps nothing alive either

        def replay():
            self.num_replays[rows] += 1
            recorded().args[0].fill_(float("nan"))
            with context():
                recorded()()

        return replay


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(denoise_graphs, "record_cuda_graph", recorder)
    monkeypatch.setattr(denoise_graphs, "graph_capture", lambda device: nullcontext())
    monkeypatch.setattr(denoise_graphs, "CAPTURABLE_BACKENDS", ("CPU_ATTN",))
    return recorder


def capture(e):
    runner = e.runner
    runner.vllm_config.compilation_config.cudagraph_capture_sizes = SIZES
    runner.model_state.capture_inner_cudagraphs(
        runner.input_buffers, runner.block_tables, runner.attn_groups, runner.kv_cache_config
    )


def ask(e, cases):
    prompts = [c["prompt"] for c in cases]
    return e.tokens(prompts, [golden_params(c) for c in cases])


def test_goldens_through_captured_passes_that_read_once(tiny_moe, recorder):
    cases = tiny_moe.cases(16)[:3]
    with start_engine(tiny_moe.path, {"passes_per_step": 3, "commit_quorum": 1}) as e:
        capture(e)
        e.runner.model_state.loop.reads_are_free = False
        assert sorted(recorder.num_replays) == [1, 2, 4, 8]
        assert ask(e, cases) == [c["output"] for c in cases]
        assert e.stats()["denoise_passes"] == sum(c["nfe"] for c in cases)
        assert recorder.num_replays[4] > 0, "three rows and one of padding"
        alone = recorder.num_replays[1]
        assert ask(e, cases[:1]) == [cases[0]["output"]]
        assert recorder.num_replays[1] > alone


def test_a_captured_pass_has_no_plan_of_its_dummies(tiny_moe, recorder, monkeypatch):
    """FlashAttention's, with a bound that falls as rows are added; its metadata in the place of a CPU's."""
    ones, bounds = torch.ones(1, dtype=torch.int32), {}

    def metadata_with_plan(num_reqs, **_):
        return {"attn": FlashAttentionMetadata(num_reqs, 1, ones, 1, ones, ones, ones, scheduler_metadata=ones)}

    def record(context, run):
        with context():
            metadata = get_forward_context().attn_metadata["attn"]
        assert metadata.scheduler_metadata is None
        bounds[metadata.num_actual_tokens] = metadata.max_num_splits
        return run

    monkeypatch.setattr(denoise_graphs, "build_attn_metadata", metadata_with_plan)
    monkeypatch.setattr(denoise_graphs, "record_cuda_graph", record)
    with start_engine(tiny_moe.path) as e:
        capture(e)
        most = e.runner.vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
    assert bounds == {n: min(most, denoise_graphs.MOST_SPLIT_ROWS // n) for n in SIZES[:-1]}


def test_captured_passes_stay_until_caches_are_set_up_again(tiny_moe, recorder, monkeypatch):
    with start_engine(tiny_moe.path) as e:
        capture(e)
        state = e.runner.model_state
        graphs = state.graphs
        assert graphs is not None
        state.get_additional_cg_support()
        assert state.graphs is graphs
        monkeypatch.setattr(MambaHybridModelState, "initialize_kv_cache", lambda self, *args: None)
        state.initialize_kv_cache(e.runner.kv_cache_config, e.runner.block_tables)
        assert state.graphs is None


def test_other_shapes_run_layer_by_layer(tiny_moe, recorder):
    """A mock-AR row among canvases, and a last canvas cut short by ``max_model_len``."""
    case = tiny_moe.cases(16)[0]
    room = len(case["prompt"]) + 24
    mock_ar = diffusion_params(mode="mock_ar", temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
    settings = golden_params(case, 24)
    prompts = [case["prompt"], tiny_moe.mock_ar[0]["prompt"][:4]]
    with start_engine(tiny_moe.path, {"passes_per_step": 2}, max_model_len=room) as e:
        expected = e.tokens(prompts, [settings, mock_ar])
        capture(e)
        e.runner.model_state.loop.reads_are_free = False
        assert e.tokens(prompts, [settings, mock_ar]) == expected
    assert sum(recorder.num_replays.values()) > 0


def test_rows_that_are_looked_at_still_read_every_pass(tiny_moe):
    """Log-probabilities are those of the pass that revealed a token; bias and penalties see what is revealed."""
    case = tiny_moe.cases(16)[1]
    more = [{"logprobs": 2}, {"logit_bias": {7: 3.0}}, {"repetition_penalty": 1.3}, {"temperature": 0.7, "seed": 3}]
    settings = [
        diffusion_params(
            **{"temperature": 0.0, **m}, max_tokens=32, confidence_threshold=0.1, ignore_eos=True, detokenize=False
        )
        for m in more
    ]
    with start_engine(tiny_moe.path, {"passes_per_step": 4}) as e:
        answers = []
        for free in (True, False):
            e.runner.model_state.loop.reads_are_free = free
            outputs = e.llm.generate([{"prompt_token_ids": case["prompt"]}] * 4, settings, use_tqdm=False)
            answers.append([(list(o.outputs[0].token_ids), o.outputs[0].logprobs) for o in outputs])
    assert answers[0] == answers[1]


class Reads(TorchDispatchMode):
    """Counts what would make a host wait for its device."""

    def __init__(self):
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        reads = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        self.num_reads += by_mask or func.overloadpacket in reads
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_between_its_passes(tiny_moe, recorder, monkeypatch):
    """Counted over the passes, with the denoiser's own layers, which are captured, left out."""
    case = tiny_moe.cases(16)[2]
    counts = {}
    passes = DenoiseLoop.run_passes

    def counted(loop, step, *args):
        with Reads() as reads:
            result = passes(loop, step, *args)
        counts.setdefault(loop.reads_between_passes(step), []).append(reads.num_reads)
        return result

    def replay_unseen(graph, *args):
        with torch.utils._python_dispatch._disable_current_modes():
            return run(graph, *args)

    run = denoise_graphs.DenoiseGraphs._replay
    monkeypatch.setattr(DenoiseLoop, "run_passes", counted)
    monkeypatch.setattr(denoise_graphs.DenoiseGraphs, "_replay", replay_unseen)
    with start_engine(tiny_moe.path, {"passes_per_step": 3}) as e:
        capture(e)
        for free in (True, False):
            e.runner.model_state.loop.reads_are_free = free
            assert ask(e, [case]) == [case["output"]]
    assert set(counts[False]) == {0}
    assert min(counts[True]) > 0, "else nothing is counted"
