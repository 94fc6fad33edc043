"""Where things are in the repository."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REAL_MODEL = ROOT / "benchmarks" / "models" / "30b-a3b"
"""The released model's ``config.json``, without weights."""
DEMO = "vllm_twotower/assets/demo"
"""The demo model as commands name it that run in ``ROOT``."""
