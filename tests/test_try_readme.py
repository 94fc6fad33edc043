"""README's commands, tried as a new user would: every one is run, or left out for a reason."""

import re
import subprocess
import sys

import pytest

from tools import try_readme
from tools.try_readme import Command, Terminal, read_commands, split_commands, try_commands

ROOT = try_readme.ROOT
README = try_readme.README.read_text(encoding="utf-8")
COMMANDS = read_commands(README)
PROGRAMS = {"curl", "export", "pip", "python", "vllm", "vllm-twotower"}


def test_every_line_of_readmes_blocks_is_in_a_command():
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    text = "\n".join(command.text for command in COMMANDS)
    forgotten = [line for line in lines if not line.startswith("#") and try_readme.COMMENT.sub("", line) not in text]
    assert len(lines) > 15
    assert forgotten == []


def test_blocks_are_of_languages_that_are_run_or_shown():
    assert set(re.findall(r"^```(\w+)$", README, re.MULTILINE)) == {"bash", "python", "text"}


def test_what_is_said_of_a_command_is_said_of_one_in_readme():
    texts = {command.text for command in COMMANDS}
    for table in (try_readme.INSTEAD, try_readme.LONG, try_readme.NOT_RUN):
        assert table.keys() - texts == set()


def test_what_is_run_names_nothing_that_a_cpu_or_a_reader_has_not_got():
    """A new command that needs something of the kind wants a line in ``INSTEAD`` or ``NOT_RUN``."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in COMMANDS:
        if command.reason_not_to_run(long=True):
            continue
        assert not re.search(r"nvidia/|_FOLDER\b|\bMODEL\b|--tensor-parallel", command.to_run), command
        program, argument, *_ = command.text.split()
        assert argument in targets if program == "make" else program in PROGRAMS, command


def test_quotations_go_on_over_lines_and_comments_go():
    block = "# first\nmake demo    # all\ncurl -d '{\n \"a\": 1}'\n\nls\n"
    assert split_commands(block) == ["make demo", "curl -d '{\n \"a\": 1}'", "ls"]


def test_a_terminal_keeps_exports_and_finds_what_does_not_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    commands = [
        Command("vllm serve"),
        Command("export WORD=seen"),
        Command("echo a $WORD $PWD$VLLM_LOGGING_LEVEL; echo ' b'", f"a ... {tmp_path}\nb\n"),
        Command("echo one", "two\n"),
        Command("echo why >&2; exit 3"),
        Command("make test"),
    ]
    tried = list(try_commands(commands, Terminal(tmp_path, tmp_path / "log"), long=False))
    assert [command for command, _, _ in tried] == commands
    outcomes = [outcome for _, outcome, _ in tried]
    assert [is_fine for _, _, is_fine in tried] == [True, True, True, False, False, True], outcomes
    assert outcomes[0] == f"not run: {try_readme.NAME_ONLY}"
    assert outcomes[2].startswith("ran, and printed what README shows")
    assert outcomes[3] == "FAILED: printed\none\nand README shows\ntwo\n"
    assert re.match(r"FAILED: exit status 3; .*\nwhy$", outcomes[4], re.DOTALL)
    assert outcomes[5].startswith("not run: ")


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_new_user_gets_what_readme_promises():
    """Everything is installed again, in an empty folder: minutes, and half a gigabyte fetched or from pip's cache."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.try_readme"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"{len(COMMANDS)} commands in README, 0 failed"
