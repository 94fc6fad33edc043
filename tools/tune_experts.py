"""Tuned launches of vLLM's Triton kernel for the experts: what vLLM has for this GPU, and vLLM's own script to add it.

    python -m tools.tune_experts                                   # which tables vLLM has, and which it lacks
    python -m tools.tune_experts --tune tables                     # measure a missing one; needs `pip install ray`
    VLLM_TUNED_CONFIG_FOLDER=tables vllm serve ...                 # serve with it

vLLM looks a table up by the number of experts, their width on a rank, the GPU's name and the weights' type; without one
it launches by a rule of thumb, and warns. The script is ``benchmarks/kernels/benchmark_moe.py`` of vLLM's source
distribution, of the version that is installed. It tries close to two thousand launches for each batch size, on every
GPU that it finds, and knows gated experts only: for this model's, which are not, it times a first product that is twice
as wide. NO GPU HAS RUN THIS YET.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.paths import REAL_MODEL
from tools.vllm_source import read_source

SCRIPT = "benchmarks/kernels/benchmark_moe.py"
DTYPES = ("auto", "fp8_w8a8")
"""The script's words for the weights: BF16 here, and FP8."""
TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""A decode step has a token for each request, a canvas 16; vLLM takes the nearest."""


def list_tables(config: dict[str, Any], tensor_parallel_size: int) -> dict[str, tuple[str, bool]]:
    """The table of each dtype for this GPU.

    Args:
        config: the model's ``config.json``.
        tensor_parallel_size: ranks that share every expert.

    Returns:
        dtype -> (the file's name, whether this vLLM or ``VLLM_TUNED_CONFIG_FOLDER`` has it).

    """
    import vllm.envs as envs
    from vllm.model_executor.layers.fused_moe import fused_moe

    folders = [pathlib.Path(fused_moe.__file__).parent / "configs"]
    if envs.VLLM_TUNED_CONFIG_FOLDER:
        folders.append(pathlib.Path(envs.VLLM_TUNED_CONFIG_FOLDER))
    width = config["moe_intermediate_size"] // tensor_parallel_size
    names = {
        dtype: fused_moe.get_config_file_name(config["n_routed_experts"], width, None if dtype == "auto" else dtype)
        for dtype in DTYPES
    }
    return {dtype: (name, any((f / name).exists() for f in folders)) for dtype, name in names.items()}


def write_backbone(config: dict[str, Any], folder: pathlib.Path) -> None:
    """Write the config under its backbone's name, which the script knows."""
    backbone = {name: value for name, value in config.items() if name != "auto_map"}
    backbone |= {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"}
    (folder / "config.json").write_text(json.dumps(backbone))


def tune(config: dict[str, Any], args: argparse.Namespace) -> int:
    """Run vLLM's script; returns its exit status."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        script = folder / pathlib.PurePosixPath(SCRIPT).name
        script.write_bytes(read_source([SCRIPT])[SCRIPT])
        write_backbone(config, folder)
        command = [sys.executable, script, "--tune", "--model", folder, "--save-dir", args.tune.resolve()]
        command += ["--tp-size", str(args.tensor_parallel_size), "--dtype", args.dtype]
        command += ["--batch-size", *map(str, args.batch_size)]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, default=REAL_MODEL, metavar="FOLDER", help="holds config.json")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights that are tuned; auto is BF16")
    parser.add_argument("--batch-size", type=int, nargs="+", default=TOKENS, help="tokens of a step, for each a launch")
    parser.add_argument("--tune", type=pathlib.Path, metavar="FOLDER", help="where the table goes")
    args = parser.parse_args()
    config = json.loads((args.config / "config.json").read_text())
    if not args.tune:
        for dtype, (name, found) in list_tables(config, args.tensor_parallel_size).items():
            print(f"{'there  ' if found else 'missing'} {dtype:8} {name}")
        return
    if not shutil.which("nvidia-smi"):
        sys.exit("nvidia-smi finds no GPU: a table is measured on the GPU that it is for")
    sys.exit(tune(config, args))


if __name__ == "__main__":
    main()
