"""The engine with every kernel on, under Triton's interpreter, still writes what NVIDIA's reference writes."""

import pytest

import vllm_twotower.ops.launch as launch_module
from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from vllm_twotower import diffusion_params, diffusion_stats
from vllm_twotower.core import KERNELS_VARIABLE

KERNELS = {
    "_read_piece",
    "_draw_piece",
    "_join_pieces",
    "_reveal",
    "_norm_and_modulate",
    "_gate_add",
    "_gated_norm",
    "_seeded_conv",
    "_seeded_scan",
}
OF_VERIFICATION = {"_replay_state", "_shift_window"}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran."""
    names = set()
    run = launch_module.launch

    def launch(kernel, *args, **kwargs):
        names.add(kernel.__name__)
        run(kernel, *args, **kwargs)

    from vllm_twotower.ops.adaln import kernel as adaln
    from vllm_twotower.ops.canvas_sample import kernel as canvas_sample
    from vllm_twotower.ops.gated_norm import kernel as gated_norm
    from vllm_twotower.ops.reveal import kernel as reveal
    from vllm_twotower.ops.seeded_scan import kernel as seeded_scan
    from vllm_twotower.ops.state_replay import kernel as state_replay

    for module in (adaln, canvas_sample, gated_norm, reveal, seeded_scan, state_replay):
        monkeypatch.setattr(module, "launch", launch)
    return names


def test_all_modes_with_kernels_on_and_off_in_one_engine(tiny_moe, launched, monkeypatch):
    case = tiny_moe.cases(16)[16]  # its canvas crosses a KV block
    golden = golden_params(case, 16)
    drawn = diffusion_params(temperature=0.8, seed=5, max_tokens=16, max_steps=2, ignore_eos=True, detokenize=False)
    mock_ar = diffusion_params(mode="mock_ar", temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
    speculation = diffusion_params(mode="self_speculation", temperature=0.0, max_tokens=3, detokenize=False)
    prompts = [case["prompt"], case["prompt"][:20], tiny_moe.mock_ar[0]["prompt"], tiny_moe.ar[0]["prompt"]]
    # a small cache: for every kernel the interpreter copies the whole allocation that a tensor lies in
    diffusion = {"passes_per_step": 16, "draft_policy": "always"}
    with start_engine(tiny_moe.path, diffusion, kv_cache_memory_bytes=16 << 20) as e:
        tokens, passes = {}, {}
        for form in ("triton", "reference", "auto"):  # auto: C++ where it was built
            monkeypatch.setenv(KERNELS_VARIABLE, form)
            tokens[form] = e.tokens(prompts, [golden, drawn, mock_ar, speculation])
            passes[form] = e.stats()["denoise_passes"]
            if form == "triton":
                assert launched == KERNELS | OF_VERIFICATION
                launched.clear()
        assert not launched
    assert tokens["triton"] == tokens["reference"] == tokens["auto"]
    assert passes["triton"] == passes["reference"] == passes["auto"]
    assert tokens["triton"][0] == case["output"][:16]
    assert tokens["triton"][2] == tiny_moe.mock_ar[0]["output"][:2]
    assert tokens["triton"][3] == tiny_moe.ar[0]["output"][:3]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "indices"), [("tiny_moe", range(10, 50, 12)), ("tiny_mlp", range(7, 50, 14))])
def test_goldens_with_kernels_on(name, indices, request, launched, monkeypatch):
    golden = request.getfixturevalue(name)
    cases = [golden.cases(16)[i] for i in indices]
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")
    # a small cache: for every kernel the interpreter copies the whole allocation that a tensor lies in
    with start_engine(golden.path, {"passes_per_step": 16}, kv_cache_memory_bytes=16 << 20) as e:
        outputs = e.llm.generate(
            [{"prompt_token_ids": c["prompt"]} for c in cases], [golden_params(c) for c in cases], use_tqdm=False
        )
        assert [list(o.outputs[0].token_ids) for o in outputs] == [c["output"] for c in cases]
        assert diffusion_stats(e.llm)["denoise_passes"] == sum(c["nfe"] for c in cases)
    assert launched == KERNELS - {"_draw_piece"}, "the goldens are greedy"
