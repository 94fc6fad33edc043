"""Run every client of ``examples/clients`` against the demo model: ``make clients``.

Their packages go into an environment of their own, ``.venv/clients``; the server is README's.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import venv

from tests.harness.server import vllm_server

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEMO = "vllm_twotower/assets/demo"
PACKAGES = ["openai", "anthropic", "litellm", "langchain-openai"]
OPTIONS = ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]


def prepare_python() -> pathlib.Path:
    """The clients' Python, made the first time."""
    target = ROOT / ".venv" / "clients"
    python = target / "bin" / "python"
    if not (target / "done").exists():
        venv.create(target, clear=True, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, *PACKAGES], check=True)
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
        diffusion = ["--diffusion", f'{{"mode": "{args.mode}"}}']
        with vllm_server(DEMO, *OPTIONS, *diffusion, log=pathlib.Path(folder) / "log", cwd=ROOT) as url:
            for client in clients:
                print(f"\n{client.name}", flush=True)
                if subprocess.run([python, client, url], env=env, check=False, timeout=120).returncode:
                    failed.append(client.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
