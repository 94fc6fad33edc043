"""vLLM's own tests, fetched and unpacked, and an environment that runs them."""

import pathlib
import re

from benchmarks.paths import DEMO, ROOT
from tools.environments import make_environment
from tools.vllm_source import fetch_source, walk_source

MODEL = "demo-model"
"""What the demo model is called there: a link beside the tests, so that servers, tokenizers and tests agree."""
MODELS_OF_THEIRS = (
    "openai-community/gpt2",
    "hmellor/tiny-random-LlamaForCausalLM",
    "facebook/opt-125m",
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-8B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceH4/zephyr-7b-beta",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
)
"""Text models that the tests name, each of which the demo model stands in for."""
BEYOND_VOCABULARY = re.compile(r"""(?<=[\[ :])(5000|9454|2753)(?=[\]},"])""")
"""Token ids that the tests ask for and the demo model's 1,536 do not have."""
REQUIREMENTS = ("pytest-asyncio", "tblib", "pytest-timeout")


def replace_token_ids(text: str) -> str:
    """A test's text with ids from 1,000 up, each by another, for those that the demo model does not have."""
    return BEYOND_VOCABULARY.sub(lambda match: str(1000 + int(match[1]) % 536), text)


def unpack_tests(archive: bytes, target: pathlib.Path) -> None:
    """Unpack the tests and chat templates, with the demo model's name for every model's, and token ids it has."""
    for path, content in walk_source(archive):
        wanted = (path.parts[:1] == ("tests",) and path.suffix == ".py") or path.match("examples/*.jinja")
        wanted = wanted or str(path) == "pyproject.toml"  # pytest's settings
        if not wanted:
            continue
        text = content.decode()
        for name in MODELS_OF_THEIRS:
            text = text.replace(f'"{name}"', f'"{MODEL}"')
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(replace_token_ids(text), encoding="utf-8")
    (target / MODEL).symlink_to(ROOT / DEMO, target_is_directory=True)


def prepare_tests(folder: pathlib.Path, version: str) -> pathlib.Path:
    """The folder with vLLM's tests; fetched the first time."""
    target = folder / f"vllm-{version}"
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        unpack_tests(fetch_source(version), unfinished)
        unfinished.rename(target)
    return target


def prepare_python(folder: pathlib.Path) -> pathlib.Path:
    """A Python with what vLLM's tests need, which sees the running one's packages behind its own."""
    target = folder / "env"
    python = target / "bin" / "python"
    done = target / "done"
    if not done.exists():
        make_environment(target, REQUIREMENTS, sees_ours=True)
        done.touch()
    return python
