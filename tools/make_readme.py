"""Rewrite what README and the demo model's card show of the model: after new weights, or a changed example.

    make quality                     # its figures are among them
    python -m tools.make_readme      # runs README's example, its server session and its trace, a few minutes

Outputs stand below the commands that print them, figures between ``<!-- name -->`` and ``<!-- /name -->``. Read the
difference before you commit it: the text around them may have to change too.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

from tests.harness.server import vllm_server
from tools.screenshot import find_browser, take_screenshot
from vllm_twotower.commands.cli import DEMO_MODEL

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CARD = DEMO_MODEL / "README.md"
QUALITY = ROOT / "benchmarks" / "results" / "quality.json"
PICTURE = ROOT / "docs" / "trace.png"
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
ANSWERED = re.compile(r"```bash\n([^`]*)```\n\n```text\n([^`]*)```")
GAMMAS = (0.8, 0.95, 0.99)
HALF_WAY = "<script>pause(); go(Math.ceil(trace.canvases[0].passes.length / 2));</script></body>"


def list_commands(readme: str) -> list[tuple[str, str]]:
    """The commands of the section on the server, each with what README says it prints."""
    return ANSWERED.findall(readme.split("## As a server")[1].split("\n## ")[0])


def serve_arguments(readme: str) -> list[str]:
    """Of README's own ``vllm serve``: model first."""
    return shlex.split(re.search(r"^vllm serve (.*)$", readme, re.MULTILINE)[1])


def run_command(command: str, url: str | None = None, **environment: str) -> str:
    """What a command of README prints in the repository's root, its server at ``url``."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    if url is not None:
        command = command.replace("http://localhost:8000", url).replace("localhost:8000", url)
    return subprocess.run(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
    ).stdout


def is_shown(printed: str, output: str) -> bool:
    """Whether README's text, in which ``...`` stands for anything, is what a command printed."""
    pattern = ".*".join(re.escape(part) for part in printed.strip().split("..."))
    return re.search(pattern, output, re.DOTALL) is not None


def renew_output(printed: str, output: str) -> str:
    """What README should show in place of ``printed``; of an abbreviated answer only its text changes."""
    if "..." not in printed:
        return output.strip() + "\n"
    text = re.compile(r'"(?:text|content)":"(?:[^"\\]|\\.)*"')
    new = text.search(output)
    return text.sub(lambda _: new[0], printed) if new else printed


def replace_output(readme: str, command: str, printed: str, output: str) -> str:
    """README with the output of a command as it is now."""
    before, after = (
        f"```bash\n{command}```\n\n```text\n{text}```" for text in (printed, renew_output(printed, output))
    )
    assert before in readme
    return readme.replace(before, after)


def with_example(readme: str) -> str:
    """The offline example: its last lines, as many as are shown."""
    _, printed = EXAMPLE.search(readme).groups()
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    lines = run_command("python examples/offline.py", **environment).rstrip().splitlines()
    new = "\n".join(line.strip() for line in lines[-printed.count("\n") :])
    return readme.replace(f"```text\n{printed}```", f"```text\n{new}\n```", 1)


def with_session(readme: str) -> str:
    """The server section's commands, in order, on one server of its own command."""
    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_server(*serve_arguments(readme), log=pathlib.Path(folder) / "log", cwd=ROOT) as url,
    ):
        for command, printed in list_commands(readme):
            readme = replace_output(readme, command, printed, run_command(command, url))
    return readme


def quality_sentence(report: dict) -> str:
    """AR's exact answers, and what the other modes keep of them."""
    exact = report["ar"]["exact"]["overall"]
    rows = {row["gamma"]: row for row in report["mask_diffusion"] if row["max_steps"] == 16}
    kept = [
        f"{100 * rows[gamma]['exact']['overall'] / exact:.0f} % of that at gamma {gamma} with "
        f"{rows[gamma]['tokens_per_forward']:.2f} tokens per forward"
        for gamma in GAMMAS
    ]
    lines = ",\n".join(kept)
    speculation = report["self_speculation"]
    kept_by_it = 100 * speculation["exact"]["overall"] / exact
    return (
        f"Greedy AR answers {100 * exact:.1f} % of {report['questions']} held-out questions exactly.\n"
        f"Self-speculation keeps {kept_by_it:.0f} % of that, word for word, with "
        f"{speculation['tokens_per_forward']:.2f} tokens per forward.\n"
        f"Mask diffusion keeps\n{lines}."
    )


def training_sentence(log: list[dict]) -> str:
    """How long both phases took and where they ended."""
    lines = []
    for phase, title in {"context": "Context tower", "denoiser": "denoiser"}.items():
        end = [row for row in log if row["phase"] == phase and "loss" in row][-1]
        lines.append(f"{title} {end['step']:,} steps in {end['minutes']:.0f} minutes to a loss of {end['loss']:.2f}")
    return ",\n".join(lines) + " (`training_log.json`)."


def take_picture(readme: str) -> None:
    """README's trace, half way through its first canvas."""
    browser = find_browser()
    if browser is None:
        print(f"no browser: {PICTURE.name} is left as it is", file=sys.stderr)
        return
    command = re.search(r"^(vllm-twotower trace .*)$", readme, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        page = pathlib.Path(folder) / "trace.html"
        run_command(f"{command} --html {page}", VLLM_CPU_KVCACHE_SPACE="1")  # as README sets it
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", HALF_WAY), encoding="utf-8")
        take_screenshot(browser, f"file://{page}", PICTURE, "1100,690")


def with_figures(text: str) -> str:
    """README or the card, with the figures of the last results."""
    figures = {
        "quality": quality_sentence(json.loads(QUALITY.read_text())),
        "training": training_sentence(json.loads((DEMO_MODEL / "training_log.json").read_text())),
    }
    for name, content in figures.items():
        marked = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        text = re.sub(f"(?<={marked[0]}).*?(?={marked[1]})", lambda _, new=content: new, text, flags=re.DOTALL)
    return text


def main() -> None:
    CARD.write_text(with_figures(CARD.read_text(encoding="utf-8")), encoding="utf-8")
    readme = with_session(with_example(with_figures(README.read_text(encoding="utf-8"))))
    README.write_text(readme, encoding="utf-8")
    take_picture(readme)


if __name__ == "__main__":
    main()
