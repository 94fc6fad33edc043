"""Whether vLLM launches the experts' kernel by a table that was measured on this GPU."""

import json
import shlex
from typing import Any

from tools.tune_experts import list_tables

TENSOR_PARALLEL_SIZES = (1, 2)


def run(args: Any) -> dict[str, Any]:
    """Names of the tables that are there, and a command for each that is not."""
    config = json.loads((args.config / "config.json").read_text())
    there, missing = [], []
    for ranks in TENSOR_PARALLEL_SIZES:
        for dtype, (name, found) in list_tables(config, ranks).items():
            command = f"python -m tools.tune_experts --tune tables --tensor-parallel-size {ranks} --dtype {dtype}"
            command += f" --config {shlex.quote(str(args.config))}"
            if found:
                there.append(name)
            else:
                missing.append(f"no {name}, which would be measured by: {command}")
    return {"there": there, "missing": missing}
