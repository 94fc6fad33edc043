"""Install mamba-ssm and causal-conv1d for the tests that hold our ops against them: ``make oracles``.

Into a folder of their own, ``.venv/oracles``, which nothing but those tests looks into. Their plain torch and their
Triton kernels only: their CUDA extensions want a CUDA toolkit, and their requirements (tilelang, quack-kernels) a GPU.
"""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = ROOT / ".venv" / "oracles"
PACKAGES = ("mamba-ssm==2.3.2.post1", "causal-conv1d==1.7.0")
WITHOUT_CUDA = {
    f"{package}_{switch}": "TRUE"
    for package in ("MAMBA", "CAUSAL_CONV1D")
    # the second: built here, since their setup.py otherwise looks for a wheel with the CUDA extension on GitHub
    for switch in ("SKIP_CUDA_BUILD", "FORCE_BUILD")
}


def install(target: pathlib.Path) -> None:
    """Install them anew, so that their modules can be imported one by one without the CUDA extensions."""
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # built with the torch that is here, which their setup.py imports
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *options, *PACKAGES], check=True, env={**os.environ, **WITHOUT_CUDA})
    # it imports every model of theirs, and with them the extension
    (target / "mamba_ssm" / "__init__.py").write_text("", encoding="utf-8")
    # the extension that the plain functions' module imports, and they do not use
    (target / "causal_conv1d_cuda.py").write_text("", encoding="utf-8")


if __name__ == "__main__":
    install(TARGET)
    print(f"{TARGET.relative_to(ROOT)} has {' and '.join(PACKAGES)}")
