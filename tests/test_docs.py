"""What README and the docs show is what happens."""

import fnmatch
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.quality_parts.questions import held_out
from tools import make_readme, shim_sections
from tools.demo_training.item import PROMPT_END
from vllm_twotower import compat, ops
from vllm_twotower.commands.demo import DEMO_QUESTION_END, DEMO_QUESTIONS, NUM_WATCHED, WAYS, demo_prompt

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
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


def marks_of(printed, good, bad):
    """The comparison's rows of marks, one for each question and a column for each way."""
    rows = [re.findall(rf"(?<= )(?:{good}|{bad})(?= |$)", line) for line in printed.splitlines()]
    return [marks for marks in rows if len(marks) == len(WAYS)]


@pytest.fixture(scope="module")
def printed():
    return run("-m", "vllm_twotower.commands.cli", "demo")


def test_the_demo_shows_three_ways_and_what_they_get_wrong(printed):
    """AR and self-speculation answer everything; mask diffusion at 0.8 keeps about what README says, not more."""
    count = len(DEMO_QUESTIONS)
    assert [way.title for way in WAYS] == ["ar", "mask diffusion 0.8", "self-speculation"]
    marks = marks_of(printed, "right", "WRONG")
    assert len(marks) == count
    right = [sum(row[column] == "right" for row in marks) for column in range(len(WAYS))]
    assert right[0] == right[2] == count
    assert 0.7 * count <= right[1] < count, "all right would give a wrong impression (README: 81 % at 0.8)"
    assert re.search(r"right" + "".join(rf"\s+{n} of {count}" for n in right) + r"$", printed, re.MULTILINE)
    wanted = [answer for answer, row in zip(DEMO_QUESTIONS.values(), marks, strict=True) if "WRONG" in row]
    assert re.findall(r"^ +right is +(.+)$", printed, re.MULTILINE) == wanted
    figures = re.search(r"tokens per forward +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
    ar, diffusion, speculation = map(float, figures.groups())
    assert 0.9 < ar < 1.1
    assert diffusion > speculation > ar
    assert re.search(r"seconds +\d\S+ +\d\S+ +\d\S+$", printed, re.MULTILINE)
    assert f"{count - right[1]} of {count} answers wrong (mask diffusion)" in printed


def test_the_demo_shows_blocks_appear_and_drafts_verified(printed):
    assert len(re.findall(r"^  \[\d\] pass  1 │(░░){16}$", printed, re.MULTILINE)) >= NUM_WATCHED
    assert re.search(r"^  \[\d\] commit  │.+│ \d+ tokens in \d passes$", printed, re.MULTILINE)
    assert re.search(r"^  \[\d\] round +\d│.*‹.+›.*│ \d+ of 15 drafts kept$", printed, re.MULTILINE)
    assert "\033[2;9m" in printed.split("=== Self-speculation")[1].split("\n", 2)[2]
    # vLLM's own warnings, more or fewer by the machine, stand before
    shown = printed[printed.index("=== Mask diffusion") :]
    assert len(shown.splitlines()) < 75


def test_the_demo_takes_a_question_of_ones_own():
    question = next(iter(DEMO_QUESTIONS))
    printed = run("-m", "vllm_twotower.commands.cli", "demo", "--prompt", question, "--max-tokens", "8")
    assert "right" not in printed
    (marks,) = marks_of(printed, "as ar", "DIFFERS")
    assert (marks[0], marks[2]) == ("as ar", "as ar")
    assert "answers unlike AR's (mask diffusion)" in printed


def test_a_question_gets_its_end_once():
    assert DEMO_QUESTION_END == PROMPT_END
    for question in ("Sort: b1\na2", r"Sort: b1\na2", r"Sort: b1\na2\nAnswer:"):
        assert demo_prompt(question) == "Sort: b1\na2\nAnswer:"


def test_the_demos_questions_are_the_first_of_each_family_that_quality_asks():
    asked = {item.prompt: item.answer for item in held_out(1)}
    assert {demo_prompt(question): f" {answer}" for question, answer in DEMO_QUESTIONS.items()} == asked
    assert all(item.is_held_out for item in held_out(1))


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


def test_examples_ask_the_model_for_its_mask():
    """Its id is a checkpoint's own, so no example may hold one."""
    files = sorted((ROOT / "examples").rglob("*.py"))
    assert len(files) > 3
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "MASK_TOKEN_ID" not in text, path
        assert not re.search(r"\bmask\w* *(=|==|!=|in) *[\[({]?\d", text, re.IGNORECASE), path


def test_no_file_cites_documents_that_are_not_here():
    cited = re.compile(r"\b[Ss]pec (section )?[0-9]|\btraps [A-Z][0-9]")
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.cpp"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    found = {path: cited.findall((ROOT / path).read_text(encoding="utf-8")) for path in listed}
    assert {path: found[path] for path in listed if found[path]} == {}


def test_readme_and_architecture_name_the_same_files_in_the_same_order():
    readers_path = {}
    for name, text in (("README.md", README), ("docs/architecture.md", ARCHITECTURE)):
        readers_path[name] = re.findall(r"^\d+\. \[`([\w/]+\.py)`\]\(([\w./]+)\)", text, re.MULTILINE)
        assert all(link.endswith(f"vllm_twotower/{file}") for file, link in readers_path[name])
    in_readme, in_architecture = ([file for file, _ in listed] for listed in readers_path.values())
    assert in_readme == in_architecture
    assert 5 < len(in_readme) <= 10
    assert all((ROOT / "vllm_twotower" / file).exists() for file in in_readme)


def test_the_drawing_has_a_node_for_each_file_of_the_readers_path():
    (drawing,) = re.findall(r"```mermaid\n(.*?)```", ARCHITECTURE, re.DOTALL)
    of_the_path = re.findall(r"^\d+\. \[`([\w/]+\.py)`", ARCHITECTURE, re.MULTILINE)
    words_and_rules = {"core.py", "oracle/reference.py", "config.py"}
    assert [file for file in of_the_path if file not in words_and_rules and file not in drawing] == []


def test_the_table_of_ops_has_every_op():
    table = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("## The ops")[1].split("\n- ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE))))
    assert named == {name for name in ops.__all__ if name.islower()}


def test_every_test_file_is_named_where_tests_are_explained():
    named = re.findall(r"`(test_[\w*]+\.py)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    files = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert {file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in named)} == set()
    assert {pattern for pattern in named if not fnmatch.filter(files, pattern)} == set()


def test_every_shim_says_what_it_is_and_names_a_test_that_exists():
    shims = {shim.name: shim for shim in shim_sections.read_shims()}
    for name, function in inspect.getmembers(compat, inspect.isfunction):
        # a function without headings belongs to another, which its docstring names
        partners = re.findall(r"``(\w+)``", function.__doc__ or "")
        assert name in shims or any(p in shims for p in partners), name
    for name, shim in shims.items():
        assert {"Change", *shim_sections.HEADINGS} == {key for key, text in shim.says.items() if text}, name
        for path, _, test in (guard.partition("::") for guard in shim.touched.values()):
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (name, path, test)


def test_the_figures_in_readme_and_on_the_card_are_those_of_the_results():
    for path in (make_readme.README, make_readme.CARD):
        text = path.read_text(encoding="utf-8")
        assert make_readme.with_figures(text) == text, path


def test_the_files_that_readme_names_exist():
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
