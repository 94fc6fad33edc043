"""Write ``docs/configuration.md`` from the code's own tables; a test compares the two.

python tools/make_docs.py            # writes it
python tools/make_docs.py --check    # exits 1 if the file is not what would be written
"""

import argparse
import ast
import dataclasses
import inspect
import pathlib
import re
import sys

from vllm_twotower import diffusion_stats
from vllm_twotower.commands.cli import make_parser
from vllm_twotower.config import CONFIG_KEY, REQUEST_PREFIX, EngineOptions, RequestOptions
from vllm_twotower.core import Mode
from vllm_twotower.frontend.startup_rules import STARTUP_RULES
from vllm_twotower.runtime.stat_loggers import COUNTERS, PASSES_PER_CANVAS

FILE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

HEAD = """# Configuration

<!-- Written by tools/make_docs.py from the code's own tables; change those and run it again. -->
"""

ENGINE = """## Engine options

`--diffusion` alone, or `--diffusion '{{"canvas_length": 16, ...}}'`, on every command built on vLLM's engine arguments;
`additional_config={{"{key}": True}}`, or a dict of the same options, in Python. A wrong key or value stops start-up.
vLLM's own `--diffusion-config '{{"canvas_length": 16}}'` means the same for this architecture.

{table}
"""

REQUEST = """## Request settings

In Python `diffusion_params(...)`, without the prefix; over HTTP in `vllm_xargs`. Unknown `{prefix}*` keys and values
out of range get a 400 that names the key, the value and what is allowed. Every other sampling parameter is vLLM's.

{table}

| mode | what runs |
| --- | --- |
{modes}
"""

RULES = """## What start-up refuses with diffusion on

| setting | because | instead |
| --- | --- | --- |
{rows}
"""

METRICS = """## Metrics

On `/metrics`, beside vLLM's own; each with vLLM's labels.

| name | meaning |
| --- | --- |
{rows}

`diffusion_stats(llm)` in Python:

{stats}
"""

COMMANDS = """## The `vllm-twotower` command

{usages}
"""


def attribute_docs(owner: type) -> dict[str, str]:
    """The string below each attribute of a class, on one line."""
    (node,) = ast.parse(inspect.getsource(owner)).body
    docs, name = {}, None
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign | ast.Assign):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            name = target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            docs[name], name = " ".join(statement.value.value.split()), None
    return docs


def allowed(provoke) -> str:
    """What the refusal of an impossible value says is allowed: the documentation and the message are one text."""
    try:
        provoke()
    except ValueError as problem:
        return re.search(r"is not allowed: use (.*)", str(problem))[1]
    raise AssertionError("an impossible value was taken")


def engine_table() -> str:
    docs = attribute_docs(EngineOptions)
    rows = ["| option | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(EngineOptions):
        range_ = allowed(lambda name=field.name: EngineOptions(**{name: object()}))
        rows.append(f"| `{field.name}` | `{field.default}` | {range_} | {docs[field.name].replace('``', '`')} |")
    return "\n".join(rows)


def request_table() -> str:
    docs, engine = attribute_docs(RequestOptions), EngineOptions()
    rows = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(RequestOptions):
        name = REQUEST_PREFIX + field.name
        range_ = allowed(lambda name=name: RequestOptions.from_extra_args({name: object()}, engine))
        if field.name == "canvas_length":
            range_ = "an integer from 1 to the engine's"
        default = "`mask_diffusion`" if field.name == "mode" else "the engine's"
        rows.append(f"| `{name}` | {default} | {range_} | {docs[field.name].replace('``', '`')} |")
    return "\n".join(rows)


def usages() -> str:
    parser = make_parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    texts = []
    for name, command in commands.choices.items():
        command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=110)
        texts.append(f"### {name}\n\n```text\n{command.format_help().strip()}\n```")
    return "\n\n".join(texts)


def configuration() -> str:
    modes = attribute_docs(Mode)
    stats = inspect.getdoc(diffusion_stats).split("Returns a dict with\n\n")[1].split("\n\nArgs")[0].replace("``", "`")
    metrics = [f"| `vllm:twotower_{name}` | counter: {text} |" for name, text in COUNTERS.items()]
    metrics.append(f"| `vllm:twotower_{PASSES_PER_CANVAS}` | histogram: denoise passes of each finished canvas. |")
    rules = [f"| {r.refuses} | {r.because} | {r.instead} |" for r in STARTUP_RULES]
    instead = {"{canvas_length_plus_1}": "(canvas length + 1)", "{canvas_length}": "(canvas length)"}
    rule_rows = "\n".join(rules).replace("{{", "{").replace("}}", "}")
    for placeholder, text in instead.items():
        rule_rows = rule_rows.replace(placeholder, text)
    sections = [
        HEAD,
        ENGINE.format(key=CONFIG_KEY, table=engine_table()),
        REQUEST.format(
            prefix=REQUEST_PREFIX,
            table=request_table(),
            modes="\n".join(f"| `{mode.value}` | {modes[mode.name]} |" for mode in Mode),
        ),
        RULES.format(rows=rule_rows),
        METRICS.format(rows="\n".join(metrics), stats=stats),
        COMMANDS.format(usages=usages()),
    ]
    return "\n".join(sections).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = configuration()
    if args.check:
        return int(FILE.read_text(encoding="utf-8") != text)
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
