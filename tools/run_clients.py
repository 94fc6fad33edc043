"""Run every client of ``examples/clients`` against the demo model: ``make clients``.

Their packages go into an environment of their own, ``.venv/clients``; the server is README's.
"""

import argparse
import os
import pathlib
import subprocess
import tempfile

from tests.harness.server import vllm_server
from tools import make_readme
from tools.environments import make_environment

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ["openai", "anthropic", "litellm", "langchain-openai"]


def prepare_python() -> pathlib.Path:
    """The clients' Python, made the first time."""
    target = ROOT / ".venv" / "clients"
    python = target / "bin" / "python"
    if not (target / "done").exists():
        make_environment(target, PACKAGES, sees_ours=False)
        (target / "done").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="mask_diffusion", help="of the server")
    args = parser.parse_args()
    python = prepare_python()
    script = f"import importlib.metadata as m; print(*(f'{{p}} {{m.version(p)}}' for p in {PACKAGES}), sep=', ')"
    subprocess.run([python, "-c", script], check=True)
    clients = sorted((ROOT / "examples" / "clients").glob("*.py"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        served = make_readme.serve_arguments((ROOT / "README.md").read_text(encoding="utf-8"))
        served.insert(served.index("--diffusion") + 1, f'{{"mode": "{args.mode}"}}')
        with vllm_server(*served, log=pathlib.Path(folder) / "log", cwd=ROOT) as url:
            for client in clients:
                print(f"\n{client.name}", flush=True)
                if subprocess.run([python, client, url], env=env, check=False, timeout=120).returncode:
                    failed.append(client.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
