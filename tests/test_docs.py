"""What README and the docs show is what happens."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# as a user has it
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def run(*arguments):
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_offline_example_prints_what_readme_says():
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL).groups()
    assert code == (ROOT / "examples" / "offline.py").read_text(encoding="utf-8")
    output = {line.strip() for line in run("examples/offline.py").splitlines()}
    assert {line.strip() for line in printed.splitlines()} <= output


def test_the_watching_example():
    lines = run("examples/watch_canvases.py").splitlines()
    canvases = [line.split("   surest: ")[0] for line in lines if "   surest: " in line]
    assert 1 <= len(canvases) <= 6
    assert canvases[0] == "_" * 16
    assert all("_" in canvas for canvas in canvases)
    emitted = next(line.removeprefix("emitted:").strip() for line in lines if line.startswith("emitted:"))
    assert emitted
    assert "_" not in emitted


def test_the_configuration_page_is_what_the_code_says():
    run("tools/make_docs.py", "--check")


def test_the_files_that_readme_names_exist():
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
