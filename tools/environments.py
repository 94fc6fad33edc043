"""Environments of their own for what the project's must not have: other versions, clients, other projects' tests."""

import pathlib
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence


def make_environment(
    target: pathlib.Path, requirements: Sequence[str], sees_ours: bool
) -> tuple[pathlib.Path, pathlib.Path]:
    """Make an environment anew.

    Args:
        target: its folder; what is there goes.
        requirements: what is installed into it.
        sees_ours: whether the running environment's packages are behind its own, editable installs included.

    Returns:
        Its Python, and the folder of its packages.

    """
    venv.create(target, clear=True, symlinks=True)
    python = target / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    printed = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    packages = pathlib.Path(printed.strip())
    if sees_ours:
        behind = f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
        (packages / "behind.pth").write_text(behind)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, *requirements], check=True)
    return python, packages
