"""The container's build without a container: the Dockerfile's own steps, in folders that stand for ``/``."""

import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
import venv

import pytest
from packaging.requirements import Requirement

from tools.setup_env import extra, write_metadata
from tools.setup_next_vllm import NEXT_VLLM

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "examples" / "deploy" / "Dockerfile"
BUILT = shutil.ignore_patterns("*.so", "__pycache__")


class Image:
    """A folder in place of ``/``; its Python is an environment that has vLLM, and not this repository, behind it."""

    def __init__(self, root: pathlib.Path, vllm: str | None = None):
        self.root = root
        self.work = root
        self.environment = root / "environment"
        venv.create(self.environment, symlinks=True)
        (packages,) = self.environment.glob("lib/*/site-packages")
        # a path and no site folder: the link to this repository that is there is not followed
        (packages / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        if vllm:
            write_metadata(packages, vllm)

    def build(self, stage: list[tuple[str, str]], before: "Image | None" = None) -> None:
        """Carry out a stage of the Dockerfile; ``before`` is the stage that it copies from."""
        for instruction, argument in stage:
            if instruction == "WORKDIR":
                self.work = self.path(argument)
                self.work.mkdir(parents=True)
            elif instruction == "COPY":
                self.copy(argument, before)
            elif instruction == "RUN" and "apt-get" not in argument:  # the compiler is this machine's
                self.run(re.sub(r"(?<=\s)/", f"{self.root}/", argument), shell=True)

    def copy(self, argument: str, before: "Image | None") -> None:
        *sources, target = argument.split()
        context = ROOT
        if sources[0].startswith("--from="):
            context = before.root
            del sources[0]
        for source in sources:
            found = context / source.lstrip("/")
            into = self.path(target)
            if found.is_dir():
                shutil.copytree(found, into, ignore=BUILT)
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, into)

    def path(self, name: str) -> pathlib.Path:
        return self.root / name.lstrip("/") if name.startswith("/") else self.work / name

    def run(self, command, **more) -> str:
        """What a command prints in the image; fails with what it complained of."""
        # without isolation the build takes this machine's setuptools, and fetches none
        settings = {"PATH": f"{self.environment}/bin:{os.environ['PATH']}", "PIP_NO_BUILD_ISOLATION": "0"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
        result = subprocess.run(
            command, cwd=self.work, env=environment, capture_output=True, text=True, check=False, **more
        )
        if result.returncode:
            raise RuntimeError(result.stderr[-3000:])
        return result.stdout


def read_stages() -> list[list[tuple[str, str]]]:
    """The Dockerfile's instructions with their arguments, a list for each ``FROM``."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if line.endswith("\\")], "a line that goes on is not read here"
    instructions = [tuple(line.split(maxsplit=1)) for line in lines]
    starts = [i for i, (instruction, _) in enumerate(instructions) if instruction == "FROM"]
    return [instructions[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> Image:
    """The stage that builds the wheel."""
    image = Image(tmp_path_factory.mktemp("builder"))
    image.build(read_stages()[1])
    return image


@pytest.fixture(scope="module")
def image(builder, tmp_path_factory) -> Image:
    """The last stage: the wheel beside vLLM, and the check of vLLM passed."""
    image = Image(tmp_path_factory.mktemp("image"))
    image.build(read_stages()[2], builder)
    return image


def test_the_image_is_of_the_newest_vllm_that_is_supported():
    base, wheel, last = read_stages()
    assert base == [("FROM", f"vllm/vllm-openai:v{NEXT_VLLM} AS base")]
    assert [wheel[0], last[0]] == [("FROM", "base AS wheel"), ("FROM", "base")]
    (supported,) = extra("gpu")
    assert Requirement(supported).specifier.contains(NEXT_VLLM)


def test_the_image_has_the_plugin_and_nothing_that_built_it(image):
    assert {path.name for path in image.root.iterdir()} == {"environment", "tmp"}
    assert list((image.root / "tmp").iterdir()) == []
    where = image.run(["python3", "-c", "import vllm_twotower as v; print(v.__file__)"])
    assert where.startswith(str(image.environment))


def test_the_wheel_is_all_that_is_needed(image):
    """Installed beside vLLM and nothing else of ours, run in an empty folder."""
    image.work = image.root / "empty"
    image.work.mkdir()
    shown = image.run(["vllm-twotower", "demo", "--prompt", "Sort: b1 a2", "--max-tokens", "16"])
    assert "=== Self-speculation" in shown


@pytest.mark.parametrize("vllm", ["0.31.2", "0.34.0"])
def test_the_build_stops_at_a_vllm_that_is_not_supported(builder, tmp_path, vllm):
    with pytest.raises(
        RuntimeError, match=rf"vllm {re.escape(vllm)} is installed, and vllm-twotower supports <0.34,>=0.32"
    ):
        Image(tmp_path, vllm).build(read_stages()[2], builder)
