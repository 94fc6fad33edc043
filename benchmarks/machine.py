"""What a benchmark's figures belong to."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

from benchmarks.paths import ROOT


def environment() -> dict[str, Any]:
    """Commit, versions and hardware; a package that is not installed is None."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found: dict[str, Any] = {
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(output_of("git", "status", "--porcelain")),
        **{package: version_of(package) for package in ("vllm", "torch", "triton")},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
    if gpu is not None and shutil.which("nvidia-smi"):
        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def described(found: dict[str, Any]) -> str:
    """An ``environment`` as a line of text."""
    return ", ".join(f"{name} {value}" for name, value in found.items())


def output_of(*command: str) -> str:
    """What a command prints in the repository's root."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def version_of(package: str) -> str | None:
    """Of an installed package, else None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
