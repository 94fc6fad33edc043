"""Do what README says as a new user would: every command of it, in order, in a fresh clone in an empty folder.

    make try-readme                  # eleven minutes on two busy cores
    make try-readme LONG=--long      # also what takes longer, `make test` first

The commands are README's, read from it: those of its blocks and those in its text. What a machine without a GPU cannot
do as it stands is done with the demo model instead (``INSTEAD``) or left out for a reason that is printed
(``NOT_RUN``). A command that is new in README is run. Where README shows what a command prints, it has to print that.
The clone is of what is committed. Port 8000, README's own, has to be free.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from tests.harness.server import wait_until_healthy
from tools.make_readme import is_shown

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PIECES = re.compile(
    r"^```(?P<language>\w+)\n(?P<block>.*?)^```$(?:\n\n^```text\n(?P<printed>.*?)^```$)?"
    r"|`(?P<inline>(?:make|pip|python|vllm|vllm-twotower) [^`\n]+)`",
    re.DOTALL | re.MULTILINE,
)
COMMENT = re.compile(r"\s+# .*$")
EXAMPLE = "python examples/offline.py"
PORT = 8000
SERVED = f"localhost:{PORT}"
SERVE = re.compile(r"(\w+=\S+ )*(\S*/)?vllm serve ")
COMMAND_SECONDS = 2400

DEMO = "vllm_twotower/assets/demo"
CPU = "TRITON_INTERPRET=1 VLLM_CPU_KVCACHE_SPACE=1"
SMALL = "--dtype float32 --max-model-len 512 --enforce-eager"
NVIDIA = "nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16"
INSTEAD = {
    "pip install '.[gpu]'": "python3 -m venv ../gpu && ../gpu/bin/pip install --quiet --dry-run '.[gpu]'",
    f"vllm serve {NVIDIA} --diffusion": f"{CPU} .venv/bin/vllm serve {DEMO} --diffusion {SMALL}",
    "vllm-twotower quantize BF16_FOLDER FP8_FOLDER": f".venv/bin/vllm-twotower quantize {DEMO} ../int8 --scheme int8",
    "vllm serve FP8_FOLDER --diffusion": f"{CPU} .venv/bin/vllm serve ../int8 --diffusion {SMALL}",
    "vllm-twotower inspect MODEL": f".venv/bin/vllm-twotower inspect {DEMO}",
    # README says both of these in the sentence after the example
    EXAMPLE: f"TRITON_INTERPRET=1 .venv/bin/{EXAMPLE}",
    "python -m tools.gpu_smoke": ".venv/bin/python -m tools.gpu_smoke --dry-run",
}
"""What is run in place of a command that needs a GPU, the released checkpoint or a path of the reader's."""

LONG = {
    "make test": "half an hour on two cores; what CI runs",
    "make quality": "three minutes on an idle core, and it rewrites results",
    "make bench": "three minutes, and it rewrites results",
    "python -m tools.gpu_smoke": "three minutes on a busy core",
}
"""What is only run when asked for, and how long it takes."""

NAME_ONLY = "a command's name, in the text"
NOT_RUN = {
    "vllm serve": NAME_ONLY,
    "vllm run-batch": f"{NAME_ONLY}; docs/batch.md has it whole, and tests/test_batch.py runs that",
    "vllm bench throughput": f"{NAME_ONLY}; `make bench-vllm` runs it",
    "vllm-twotower inspect": NAME_ONLY,
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as README has it, without its comment, and what README says it prints."""

    text: str
    printed: str = ""

    @property
    def to_run(self) -> str:
        return INSTEAD.get(self.text, self.text)

    def reason_not_to_run(self, long: bool) -> str | None:
        if self.text in LONG and not long:
            return LONG[self.text]
        return NOT_RUN.get(self.text)


def read_commands(readme: str) -> list[Command]:
    """All of them in README's order; one that stands in the text twice is only there once."""
    commands: list[Command] = []
    for piece in PIECES.finditer(readme):
        printed = piece["printed"] or ""
        if piece["inline"]:
            known = {command.text for command in commands}
            found = [Command(piece["inline"])] if piece["inline"] not in known else []
        elif piece["language"] == "python":
            found = [Command(EXAMPLE, printed)]  # README says so below it, and a test that it is this file
        elif piece["language"] == "bash":
            *first, last = split_commands(piece["block"])
            found = [*map(Command, first), Command(last, printed)]
        else:
            found = []
        commands += found
    return commands


def split_commands(block: str) -> list[str]:
    """The commands of a block of shell: one a line, unless a quotation goes on."""
    commands = []
    unfinished = ""
    for line in block.splitlines():
        unfinished += line
        try:
            words = shlex.split(unfinished, comments=True)
        except ValueError:
            unfinished += "\n"
            continue
        if words:
            commands.append(COMMENT.sub("", unfinished))
        unfinished = ""
    return commands


class BrokenPromiseError(Exception):
    """A command did not do what README says."""


class Terminal:
    """Runs commands in a folder as a shell there would: what is exported stays, a server stays while it is asked."""

    def __init__(self, folder: pathlib.Path, log: pathlib.Path):
        self.folder = folder
        self.log = log
        self.exports: list[str] = []
        self.server: subprocess.Popen | None = None

    def run(self, command: Command) -> None:
        """Run one to its end, or a server until it answers.

        Raises:
            BrokenPromiseError: it failed, or printed something else than README shows.

        """
        text = command.to_run
        if SERVED not in text:
            self.stop_server()
        if SERVE.match(text):
            self.start_server(text)
            return
        if text.startswith("export "):
            self.exports.append(text)
        output = self.output_of(text)
        if not is_shown(command.printed, output):
            raise BrokenPromiseError(f"printed\n{output}\nand README shows\n{command.printed}")

    def output_of(self, text: str) -> str:
        """What a command prints, without blanks around its lines."""
        with self.log.open("a") as log:
            try:
                done = subprocess.run(
                    self.shell(text),
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    timeout=COMMAND_SECONDS,
                    **self.place,
                )
            except subprocess.TimeoutExpired as late:
                raise BrokenPromiseError(f"not done after {COMMAND_SECONDS} s") from late
            log.write(done.stdout)
        if done.returncode:
            raise BrokenPromiseError(f"exit status {done.returncode}; the log ends in\n{self.end_of_log()}")
        return "\n".join(line.strip() for line in done.stdout.splitlines())

    def start_server(self, text: str) -> None:
        if is_taken(PORT):
            raise BrokenPromiseError(f"port {PORT} is taken")
        with self.log.open("ab") as log:
            command = self.shell(f"exec env {text}")
            self.server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **self.place)
        try:
            wait_until_healthy(f"http://{SERVED}", self.server, self.log)
        except RuntimeError as problem:
            raise BrokenPromiseError(str(problem)) from problem

    def stop_server(self) -> None:
        """As Ctrl-C does: the signal goes to all of its processes."""
        if self.server is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGINT)
        try:
            self.server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
        self.server = None

    def shell(self, text: str) -> list[str]:
        return ["bash", "-c", "\n".join([*self.exports, text])]

    @property
    def place(self) -> dict:
        """Where a command runs: here, with nobody to type anything, in a group of processes of its own."""
        return {
            "cwd": self.folder,
            "env": new_users_environment(),
            "stdin": subprocess.DEVNULL,
            "start_new_session": True,
        }

    def end_of_log(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def new_users_environment() -> dict[str, str]:
    """This process's, without what belongs to this project or to the environment that it runs in."""
    ours = ("PYTHON", "VIRTUAL_ENV", "VLLM_", "TRITON_", "TWOTOWER_", "OMP_", "MAKE", "MFLAGS", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    folders = kept["PATH"].split(os.pathsep)
    return {**kept, "PATH": os.pathsep.join(f for f in folders if not pathlib.Path(f, "vllm").exists())}


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def try_commands(commands: list[Command], terminal: Terminal, long: bool) -> Iterator[tuple[Command, str, bool]]:
    """Every command with what came of it, and whether that is as it should be."""
    try:
        for command in commands:
            reason = command.reason_not_to_run(long)
            if reason is not None:
                yield command, f"not run: {reason}", True
                continue
            begun = time.monotonic()
            try:
                terminal.run(command)
            except BrokenPromiseError as problem:
                yield command, f"FAILED: {problem}", False
                continue
            said = "ran, and printed what README shows" if command.printed else "ran"
            yield command, f"{said}, {time.monotonic() - begun:.0f} s", True
    finally:
        terminal.stop_server()


def describe(command: Command, outcome: str) -> str:
    """The lines of the report on a command."""
    changed = "" if command.to_run == command.text or outcome.startswith("not run") else f"\n    as {command.to_run}"
    return f"{command.text}{changed}\n    {outcome}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="also what takes long: " + ", ".join(LONG))
    args = parser.parse_args()
    commands = read_commands(README.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as empty:
        clone = pathlib.Path(empty) / "vllm-twotower"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        failed = 0
        for command, outcome, is_fine in try_commands(
            commands, Terminal(clone, pathlib.Path(empty) / "log"), args.long
        ):
            print(describe(command, outcome), flush=True)
            failed += not is_fine
    print(f"{len(commands)} commands in README, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
