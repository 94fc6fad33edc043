"""What start-up refuses and what it sets, on vLLM's real configuration objects."""

import contextlib
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_twotower import compat, register, registration
from vllm_twotower.config import EngineOptions
from vllm_twotower.frontend.startup_rules import SCHEDULER_CLASS, STARTUP_RULES, check_settings
from vllm_twotower.registration import DEFAULT_MAX_NUM_SEQS, TwoTowerConfigHook


@pytest.fixture
def make_config(tiny_mlp):
    def make(diffusion=True, **settings):
        extra = {"diffusion": diffusion} if diffusion is not None else {}
        defaults = {"skip_tokenizer_init": True, "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
        return EngineArgs(
            model=str(tiny_mlp.path), additional_config=extra, **{**defaults, **settings}
        ).create_engine_config()

    return make


# ---- refusals --------------------------------------------------------------------------------------------------------


def _set(path, value):
    def change(config):
        *parents, name = path.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        object.__setattr__(owner, name, value)

    return change


def _both(*changes):
    return lambda config: [change(config) for change in changes]


REFUSALS = [
    ("`--pipeline", _set("parallel_config.pipeline_parallel_size", 2), "pipeline_parallel_size=2.*tensor-parallel"),
    ("`--decode", _set("parallel_config.decode_context_parallel_size", 2), "decode_context_parallel_size=2"),
    ("`--decode", _set("parallel_config.prefill_context_parallel_size", 2), "prefill_context_parallel_size=2"),
    ("`--kv-transfer", _set("kv_transfer_config", object()), "kv_transfer_config.*leave it out"),
    ("`--kv-transfer", _set("ec_transfer_config", object()), "ec_transfer_config.*leave it out"),
    (
        "`--speculative",
        _set("speculative_config", object()),
        "speculative_config.*already emits several tokens.*leave it out",
    ),
    ("`--enable-lora", _set("lora_config", object()), "lora_config.*--enable-lora"),
    ("`--enable-dbo", _set("parallel_config.enable_dbo", True), "--enable-dbo"),
    ("batch-sharded", _set("parallel_config.enable_batch_sharded_sampling", True), "leave it out"),
    ("`--return", _set("model_config.return_sampling_mask", True), "return_sampling_mask.*leave it out"),
    ("watermarking", _set("watermark_config", object()), "watermark_config"),
    ("`--mamba", _set("cache_config.mamba_cache_mode", "all"), "mamba_cache_mode=all.*align"),
    ("ReplaySSM", _set("cache_config.use_replayssm", True), "use_replayssm"),
    ("`--kv-cache", _set("cache_config.cache_dtype", "nvfp4"), "kv_cache_dtype=nvfp4: .*--kv-cache-dtype fp8"),
    ("`--scheduling", _set("scheduler_config.policy", "priority"), "policy=priority.*fcfs"),
    (
        "`--data-parallel-size` above 1 with",
        _both(
            _set("model_config.hf_config", SimpleNamespace(hybrid_override_pattern="ME", n_group=1, topk_group=1)),
            _set("parallel_config.data_parallel_size", 2),
            _set("parallel_config.enable_expert_parallel", True),
        ),
        "data_parallel_size=2.*one engine per replica",
    ),
    ("`--enable-eplb", _set("parallel_config.enable_eplb", True), "enable_eplb.*leave it out"),
    ("`--worker", _set("parallel_config.worker_extension_cls", "mine.Own"), "mine.Own.*leave it out"),
    ("`--scheduler-cls", _set("scheduler_config.scheduler_cls", "mine.Own"), "mine.Own.*leave it out"),
    ("`--prefill", _set("scheduler_config.prefill_schedule_interval", 4), "interval=4.*leave it at 1"),
    ("`--max-num-b", _set("scheduler_config.max_num_batched_tokens", 12), "max_num_batched_tokens=12.*16 or more"),
    ("`--long", _set("scheduler_config.long_prefill_token_threshold", 10), "threshold=10.*16 or more"),
    ("`--max-model-len", _set("model_config.max_model_len", 16), "max_model_len=16.*17 or more"),
    (
        "a `--tensor",
        _set("parallel_config.tensor_parallel_size", 64),
        r"size=64 \(32 ranks do not divide.*that divides",
    ),
    ("an odd", _set("parallel_config.tensor_parallel_size", 3), "tensor_parallel_size=3.*colocated"),
    (
        "`--data-parallel-size` above 1 or",
        _both(
            _set("parallel_config.tensor_parallel_size", 2),
            _set("parallel_config.enable_expert_parallel", True),
        ),
        "enable_expert_parallel=True.*colocated",
    ),
]
REFUSED_ELSEWHERE = {
    "`VLLM_USE_BREAKABLE_CUDAGRAPH`",
    "vLLM's deprecated model runner (V1)",
    "an FP8 cache with `--attention-backend FLASHINFER` on Blackwell",
}


@pytest.mark.parametrize(("rule", "change", "message"), REFUSALS)
def test_start_up_refuses(make_config, rule, change, message):
    config = make_config()
    check_settings(config, EngineOptions())  # as it is, nothing objects
    change(config)
    options = EngineOptions(tower_placement="split" if config.parallel_config.tensor_parallel_size > 1 else "auto")
    with pytest.raises(ValueError, match=message):
        check_settings(config, options)
    (objecting,) = [r for r in STARTUP_RULES if r.refuses.startswith(rule)]
    assert objecting.problem(config, options)


def test_every_rule_is_tested():
    tested = {r.refuses for r in STARTUP_RULES if r.refuses.startswith(tuple(rule for rule, _, _ in REFUSALS))}
    assert tested | REFUSED_ELSEWHERE == {r.refuses for r in STARTUP_RULES}


def test_vllms_own_speculation_is_refused_on_a_cpu(make_config):
    config = make_config(diffusion=None)
    config.speculative_config = object()
    with pytest.raises(ValueError, match=r"speculative_config is set.*leave it out"):
        check_settings(config, None)


def test_experts_in_groups_are_refused_on_a_cpu(make_config):
    config = make_config(diffusion=None)
    config.model_config.hf_config = SimpleNamespace(hybrid_override_pattern="ME", n_group=2, topk_group=1)
    with pytest.raises(ValueError, match=r"n_group=2, topk_group=1.*set both to 1"):
        check_settings(config, None)


def test_one_device_cannot_be_split(make_config):
    with pytest.raises(ValueError, match=r"tensor_parallel_size=1 with tower_placement=split.*colocated"):
        make_config(diffusion={"tower_placement": "split"})


def test_the_deprecated_runner_is_refused(make_config, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER"):
        make_config()


def test_breakable_graphs_are_refused(make_config, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        make_config()


@pytest.mark.parametrize(
    ("backend", "dtype", "family", "refused"),
    [
        ("FLASHINFER", "fp8", 100, True),
        (None, "fp8_e5m2", 100, True),  # which vLLM gives to FlashInfer
        ("FLASHINFER", "auto", 100, False),
        ("FLASHINFER", "fp8", 90, False),
        ("TRITON_ATTN", "fp8_e5m2", 100, False),
        (None, "fp8", 100, False),
    ],
)
def test_fp8_queries_of_canvases_are_refused_where_flashinfer_takes_none(
    make_config, monkeypatch, backend, dtype, family, refused
):
    config = make_config()
    monkeypatch.setattr(type(current_platform), "is_device_capability_family", lambda _, asked: asked == family)
    config.attention_config.backend = AttentionBackendEnum[backend] if backend else None
    config.cache_config.cache_dtype = dtype
    message = f"kv_cache_dtype={dtype} with attention backend FLASHINFER: .*--kv-cache-dtype fp8 without"
    with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
        check_settings(config, EngineOptions())


def test_without_the_interpreter_a_cpu_says_what_to_type(make_config, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    for diffusion in (True, None):
        with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
            make_config(diffusion=diffusion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas": 16}, "unknown diffusion engine option 'canvas'"),
        ({"canvas_length": 0}, "canvas_length=0.*from 1 to 32"),
        ({"commit_quorum": 1.5}, "commit_quorum=1.5"),
        ({"commit_quorum": "some"}, "commit_quorum='some'.*a number from 0"),
        ({"draft_policy": "never"}, "draft_policy='never' is not allowed: use one of auto, always"),
        ("yes", "diffusion='yes'"),
    ],
)
def test_a_wrong_option_stops_start_up(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(diffusion=options)


# ---- defaults --------------------------------------------------------------------------------------------------------


def test_what_the_hook_sets(make_config):
    config = make_config()
    assert config.scheduler_config.scheduler_cls == SCHEDULER_CLASS
    assert config.scheduler_config.async_scheduling is False
    assert config.scheduler_config.max_num_seqs == DEFAULT_MAX_NUM_SEQS
    assert config.attention_config.use_non_causal is True
    assert config.cache_config.mamba_ssm_cache_dtype == "float32"


@pytest.mark.parametrize("places", [1, 100, 128, 256])
def test_a_number_of_places_that_was_asked_for_is_kept(make_config, places):
    assert make_config(max_num_seqs=places).scheduler_config.max_num_seqs == places


def test_the_default_number_of_places_leaves_room_for_what_else_was_asked_for(make_config):
    assert make_config(diffusion={}).scheduler_config.max_num_seqs == DEFAULT_MAX_NUM_SEQS
    assert make_config(max_num_batched_tokens=32).scheduler_config.max_num_seqs == 32
    config = make_config(max_num_active_seqs=100).scheduler_config
    assert (config.max_num_seqs, config.max_num_active_seqs) == (100, 100)


def test_without_diffusion_the_scheduler_is_vllms(make_config):
    config = make_config(diffusion=None)
    assert config.scheduler_config.scheduler_cls != SCHEDULER_CLASS
    assert config.scheduler_config.max_num_seqs > DEFAULT_MAX_NUM_SEQS


def test_vllms_own_diffusion_config_means_the_same(make_config):
    config = make_config(diffusion=None, diffusion_config={"canvas_length": 8, "max_denoising_steps": 4})
    assert config.diffusion_config is None
    assert config.additional_config["diffusion"] == {"canvas_length": 8, "max_steps": 4}
    assert config.scheduler_config.scheduler_cls == SCHEDULER_CLASS


# ---- harmlessness ----------------------------------------------------------------------------------------------------


def test_registering_twice_is_fine():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register()
    register()
    assert MODELS_CONFIG_MAP["NemotronHTwoTowerForCausalLM"] is TwoTowerConfigHook


def test_a_broken_registration_surfaces_when_our_architecture_is_loaded_and_not_before(make_config, monkeypatch):
    def broken(*args):
        raise ImportError("vLLM moved it")

    monkeypatch.setattr(registration, "_recorded_problem", None)
    monkeypatch.setattr(compat, "add_config_hook", broken)
    register()
    with pytest.raises(RuntimeError, match="ImportError: vLLM moved it"):
        make_config()
