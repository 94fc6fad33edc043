"""Make ``.venv/ray``: Ray in front of this environment's packages, for ``examples/ray_data.py`` and its test."""

import pathlib

from tools.environments import make_environment

TARGET = pathlib.Path(__file__).resolve().parents[1] / ".venv" / "ray"

if __name__ == "__main__":
    make_environment(TARGET, ["ray[data,serve]==2.60.0"], sees_ours=True)
    (TARGET / "done").touch()
