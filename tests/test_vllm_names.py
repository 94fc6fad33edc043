"""The check of private vLLM names passes on the vLLM the tests run on, and notices what a release can take away."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOL = [sys.executable, "-m", "tools.check_vllm_names"]
SITE_PACKAGES = pathlib.Path(importlib.util.find_spec("vllm").submodule_search_locations[0]).parent


def check(*args: object) -> tuple[int, list[str]]:
    done = subprocess.run([*TOOL, *map(str, args)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_installed_vllm_has_every_name() -> None:
    assert check("--installed") == (0, ["this vLLM has every name that we use"])


# file, what a release renames there, what the check says and about which file of ours
RENAMED = [
    ("model_executor/models/config.py", "MODELS_CONFIG_MAP", "MODELS", "engine.py.*MODELS_CONFIG_MAP"),
    ("v1/core/sched/scheduler.py", "def _free_request(", "def _drop(", 'scheduler.py.*"_free_request"'),
    ("v1/core/sched/scheduler.py", "grammar_compile_error_reqs", "broken", "grammar_compile_error_reqs is missing"),
    ("v1/worker/gpu/attn_utils.py", "causal", "mask", 'denoise_graphs.py.*argument "causal"'),
    ("v1/worker/gpu/model_runner.py", "custom_sampler", "hook", "no longer asks for custom_sampler"),
    ("v1/worker/gpu/sample/output.py", "num_nans:", "num_infs:", "num_nans is missing"),
    ("v1/worker/gpu/model_runner.py", "prepare_prefill_inputs", "fill", "shims.py.*prepare_prefill_inputs is missing"),
    ("config/cache.py", "cache_dtype", "dtype_of_cache", "startup_rules.py.*VllmConfig.cache_config.cache_dtype"),
    ("config/cache.py", "use_replayssm", "replay", "startup_rules.py.*use_replayssm is missing"),
    ("model_executor/models/nemotron_h.py", "self.kv_size", "self.kvs", "kv_size is missing"),
    ("v1/worker/gpu/model_states/mamba_hybrid.py", "slot_mappings:", "slots:", "model_state.py.*prepare_attn"),
]


@pytest.fixture(scope="module")
def renamed_wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The installed vLLM's Python as a wheel, after all of ``RENAMED``."""
    texts: dict[str, str] = {}
    for path, old, new, _ in RENAMED:
        text = texts.get(path) or (SITE_PACKAGES / "vllm" / path).read_text(encoding="utf-8")
        assert old in text
        texts[path] = text.replace(old, new)
    wheel = tmp_path_factory.mktemp("wheel") / "vllm-0.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in [*(SITE_PACKAGES / "vllm").rglob("*.py"), SITE_PACKAGES / "vllm" / "py.typed"]:
            name = path.relative_to(SITE_PACKAGES).as_posix()
            archive.writestr(name, texts.get(name.removeprefix("vllm/")) or path.read_bytes())
    return wheel


def test_every_renamed_name_is_named_with_its_user(renamed_wheel: pathlib.Path) -> None:
    code, lines = check(renamed_wheel)
    assert code == 1
    for _, _, _, expected in RENAMED:
        assert any(re.search(expected, line) for line in lines), (expected, lines)


def test_what_holds_no_vllm_is_said(tmp_path: pathlib.Path) -> None:
    done = subprocess.run([*TOOL, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "holds no vLLM" in done.stderr
