"""What README and the docs show is what happens."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

from tools import make_docs, make_readme
from tools.demo_training.item import PROMPT_END, Item
from vllm_twotower import compat
from vllm_twotower.commands.cli import DEMO_QUESTION_END, DEMO_QUESTIONS, DEMO_RUNS, demo_prompt

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
    code, printed = make_readme.EXAMPLE.search(README).groups()
    assert code == (ROOT / "examples" / "offline.py").read_text(encoding="utf-8")
    output = {line.strip() for line in run("examples/offline.py").splitlines()}
    assert {line.strip() for line in printed.splitlines()} <= output


def test_the_demo_answers_its_own_questions():
    """At the published setting all are right; the other settings and AR are shown beside it."""
    printed = run("-m", "vllm_twotower.commands.cli", "demo")
    count = len(DEMO_QUESTIONS)
    right = re.findall(r"(\d) of (\d) answers are right", printed)
    assert right[0] == (str(count), str(count))
    assert len(right) == len(DEMO_RUNS)
    for question, answer in DEMO_QUESTIONS.items():
        assert f"  {demo_prompt(question)}\033[1m {answer}\033[0m" in printed
    assert len(re.findall(r"^\| (mask_diffusion|ar)\b", printed, re.MULTILINE)) == len(DEMO_RUNS)


def test_the_demo_takes_a_question_of_ones_own():
    question = next(iter(DEMO_QUESTIONS))
    printed = run("-m", "vllm_twotower.commands.cli", "demo", "--prompt", question, "--max-tokens", "8")
    assert printed.count(f"  {question}\nAnswer:\033[1m") == len(DEMO_RUNS)
    assert "are right" not in printed


def test_a_question_gets_its_end_once():
    assert DEMO_QUESTION_END == PROMPT_END
    for question in ("Sort: b1\na2", r"Sort: b1\na2", r"Sort: b1\na2\nAnswer:"):
        assert demo_prompt(question) == "Sort: b1\na2\nAnswer:"


def test_the_demos_questions_are_held_out():
    for question, answer in DEMO_QUESTIONS.items():
        assert Item.make("", question, f" {answer}").is_held_out


def test_the_watching_example():
    lines = run("examples/watch_canvases.py").splitlines()
    canvases = [line.split("   surest: ")[0] for line in lines if "   surest: " in line]
    assert 1 <= len(canvases) <= 6
    assert canvases[0] == "_" * 16
    assert all("_" in canvas for canvas in canvases)
    emitted = next(line.removeprefix("emitted:").strip() for line in lines if line.startswith("emitted:"))
    assert emitted
    assert "_" not in emitted


def test_the_generated_pages_are_what_the_code_says():
    run("-m", "tools.make_docs", "--check")


def test_every_shim_says_what_it_is_and_names_a_test_that_exists():
    shims = {name: says for file in make_docs.read_shims().values() for name, says in file.items()}
    for name, function in inspect.getmembers(compat, inspect.isfunction):
        # a function without headings belongs to another, which its docstring names
        partners = re.findall(r"``(\w+)``", function.__doc__ or "")
        assert name in shims or any(p in shims for p in partners), name
    for name, says in shims.items():
        assert {"Change", *make_docs.HEADINGS} == {key for key, text in says.items() if text}, name
        path, _, test = says["Test"].partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), says["Test"]


def test_the_figures_in_readme_and_on_the_card_are_those_of_the_results():
    for path in (make_readme.README, make_readme.CARD):
        text = path.read_text(encoding="utf-8")
        assert make_readme.with_figures(text) == text, path


def test_the_files_that_readme_names_exist():
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
