"""The check of private vLLM names passes on the vLLM the tests run on, and notices what a release can take away."""

import importlib.util
import pathlib
import subprocess
import sys
import zipfile

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[1] / "tools" / "check_vllm_names.py"


def check(*args: object) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """Those files of the installed vLLM that the check reads, by their path in a wheel."""
    spec = importlib.util.spec_from_file_location("check_vllm_names", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    root = tool.root_of_installed()
    read = (name for name, tree in tool.Checker(root).sources.modules.items() if tree and name.split(".")[0] == "vllm")
    stems = [name.replace(".", "/") for name in read]
    paths = [p for stem in stems for p in (f"{stem}.py", f"{stem}/__init__.py") if (root / p).is_file()]
    return {path: (root / path).read_text(encoding="utf-8") for path in paths}


def wheel(folder: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    path = folder / "vllm-0.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_installed_vllm_has_every_name() -> None:
    code, lines = check("--installed")
    assert (code, len(lines)) == (0, 1), lines
    assert int(lines[0].split()[0]) > 500


def test_a_wheel_is_read_like_an_installation(tmp_path: pathlib.Path, installed: dict[str, str]) -> None:
    assert check(wheel(tmp_path, installed)) == check("--installed")


def test_a_tiny_wheel_lacks_names(tmp_path: pathlib.Path) -> None:
    scheduler = (
        "class Scheduler:\n    def schedule(self, deadline): ...\n    def _free_request(self, request, *, now): ...\n"
    )
    files = {"vllm/__init__.py": "SamplingParams = 1\n", "vllm/v1/core/sched/scheduler.py": scheduler}
    code, lines = check(wheel(tmp_path, files))
    missing = {line.split(": ", 1)[1]: line.split(":")[0] for line in lines}
    assert code == 1
    assert missing["vllm.ModelRegistry is missing"] == "vllm_twotower/registration.py"
    assert missing["vllm.v1.core.sched.scheduler.Scheduler._update_after_schedule is missing"]
    assert not any(
        name.startswith(("vllm.SamplingParams ", "vllm.v1.core.sched.scheduler.Scheduler ")) for name in missing
    )


# One of each verb and check; the others with `make test-slow`.
RENAMED = [
    ("vllm/model_executor/models/config.py", "MODELS_CONFIG_MAP", "CONFIGS", "MODELS_CONFIG_MAP is missing"),
    ("vllm/v1/core/sched/scheduler.py", "def _free_request(", "def _drop(", "Scheduler._free_request is missing"),
    ("vllm/v1/worker/gpu/attn_utils.py", "causal", "mask", "build_attn_metadata(causal=) is missing"),
    ("vllm/v1/worker/gpu/model_runner.py", "custom_sampler", "hook", "GPUModelRunner no longer reads custom_sampler"),
]
MORE_RENAMED = [
    ("vllm/v1/core/sched/scheduler.py", "max_num_active_reqs", "limit", "Scheduler.max_num_active_reqs is missing"),
    ("vllm/v1/worker/gpu/input_batch.py", "prefill_len_np", "prefill_np", "InputBatch.prefill_len_np is missing"),
    ("vllm/v1/worker/gpu/sample/output.py", "num_nans:", "num_infs:", "SamplerOutput no longer takes num_nans"),
    ("vllm/config/cache.py", "use_replayssm", "replay", "CacheConfig.use_replayssm is missing"),
    ("vllm/v1/worker/gpu/model_states/mamba_hybrid.py", "slot_mappings:", "slots:", "prepare_attn takes ("),
]


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [*RENAMED, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_RENAMED)],
)
def test_a_renamed_name_is_named_with_its_user(
    tmp_path: pathlib.Path, installed: dict[str, str], path: str, old: str, new: str, expected: str
) -> None:
    assert old in installed[path]
    code, lines = check(wheel(tmp_path, {**installed, path: installed[path].replace(old, new)}))
    assert code == 1
    assert any(expected in line and line.startswith("vllm_twotower/") for line in lines), lines
