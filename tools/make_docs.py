"""Write ``docs/configuration.md`` and ``docs/compatibility.md`` from the code's own tables and docstrings.

python -m tools.make_docs            # writes them
python -m tools.make_docs --check    # exits 1 if a file is not what would be written
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import pathlib
import re
import sys

from tools.shim_sections import Shim, read_shims
from vllm_twotower import diffusion_stats
from vllm_twotower.commands.cli import make_parser
from vllm_twotower.config import CONFIG_KEY, REQUEST_PREFIX, EngineOptions, RequestOptions
from vllm_twotower.core import Mode
from vllm_twotower.frontend.startup_rules import STARTUP_RULES
from vllm_twotower.registration import DEFAULT_MAX_NUM_SEQS
from vllm_twotower.runtime.stat_loggers import COUNTERS, PASSES_PER_CANVAS

ROOT = pathlib.Path(__file__).resolve().parents[1]

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

DEFAULTS = """## What diffusion changes of vLLM's defaults

`--max-num-seqs` is at most {max_num_seqs} where it is not given (vLLM: 128 to 1,024): each running request holds a
Mamba state and a canvas of logits, and the gain over AR is largest around there. A value that is given is kept.
`--async-scheduling` is off, the scheduler and the worker extension are the plugin's own.
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


COMPATIBILITY = """# Compatibility with vLLM

<!-- Written by tools/make_docs.py from its own tables and the docstrings of shims. -->

Most of what this plugin needs of vLLM has no public hook. Where it patches vLLM or works around something there, a
function of `vllm_twotower/compat/` does it (what only a CPU needs: `cpu/shims.py`, and the driver of
`cpu/triton_interpreter/`) and says so in its docstring. This page is made of those. Not listed is what the classes that
vLLM asks us for (scheduler, model state, sampler, models) override, read and write of their bases and arguments,
private names among them. `tools/check_vllm_names.py` checks both: it finds names that are gone from a vLLM, and calls
and overrides that no longer fit, without installing it.

## Which vLLM ran what

| vLLM | what ran |
| --- | --- |
{versions}

## What a release changed among the touched names

| from | to | name | change | what it does to us |
| --- | --- | --- | --- | --- |
{changes}

## Touched names

{sections}
"""

VERSIONS = {
    "0.32 (CPU wheel)": "All tests, on a CPU; no GPU.",
    "0.33": "On a CPU, its Python over 0.32's compiled libraries: all 260 tests of `make test-next` "
    "(2026-11-29, 10 minutes on one core), and vLLM's own API tests in every mode (`make conformance-next`); its "
    "CUDA platform with made-up GPUs: `make rehearsal`. "
    "`tools/check_vllm_names.py` finds nothing missing in its wheel.",
}

RELEASES = [
    (
        "0.32",
        "0.33",
        "`BlockTables.gather_block_tables`",
        "new keyword `num_computed_tokens`, which the runner passes",
        "a CPU's stand-in that does not take it ends the engine at every request",
    ),
    (
        "0.32",
        "0.33",
        "`apply_top_k_top_p` in `sample.sampler`, `sample.states`",
        "new keywords",
        "a CPU's stand-in that does not take them ends the engine at every `ar` request",
    ),
    (
        "0.32",
        "0.33",
        "`input_batch.post_update`",
        "two more positional arguments: a drafter's tokens, and where they go",
        "a CPU's stand-in that does not take them ends the engine at the first token",
    ),
    (
        "0.32",
        "0.33",
        "`Scheduler.grammar_compile_error_reqs`",
        "a dict of id and error, was a set of ids",
        "a NaN in a request's logits would have ended the engine; `end_with_error` takes both",
    ),
]
"""What was seen when a vLLM release met this package: from, to, name, change, effect."""


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


def read_allowed(provoke) -> str:
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
        range_ = read_allowed(lambda name=field.name: EngineOptions(**{name: object()}))
        rows.append(f"| `{field.name}` | `{field.default}` | {range_} | {docs[field.name].replace('``', '`')} |")
    return "\n".join(rows)


def request_table() -> str:
    docs, engine = attribute_docs(RequestOptions), EngineOptions()
    rows = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(RequestOptions):
        name = REQUEST_PREFIX + field.name
        range_ = read_allowed(lambda name=name: RequestOptions.from_extra_args({name: object()}, engine))
        if field.name == "canvas_length":
            range_ = "an integer from 1 to the engine's"
        default = "`mask_diffusion`" if field.name == "mode" else "the engine's"
        rows.append(f"| `{name}` | {default} | {range_} | {docs[field.name].replace('``', '`')} |")
    return "\n".join(rows)


def list_usages() -> str:
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
        DEFAULTS.format(max_num_seqs=DEFAULT_MAX_NUM_SEQS),
        RULES.format(rows=rule_rows),
        METRICS.format(rows="\n".join(metrics), stats=stats),
        COMMANDS.format(usages=list_usages()),
    ]
    return "\n".join(sections).rstrip() + "\n"


def shim_table(shims: list[Shim]) -> str:
    """A row per touched name; a shim's second name and further ones refer to its first row."""
    rows = [
        "| name of vLLM's | what we need it for | what changes | guarded by | can go when |",
        "| --- | --- | --- | --- | --- |",
    ]
    for shim in shims:
        symptom, change, end = (shim.says[key].rstrip(".") for key in ("Symptom", "Change", "Removed when"))
        (first, test), *others = shim.touched.items()
        rows.append(f"| `{first}` | {symptom} | `{shim.name}`: {change} | `{test}` | {end} |")
        for name, test in others:
            guard = "as above" if test == shim.says["Test"] else f"`{test}`"
            rows.append(f"| `{name}` | as above | `{shim.name}` | {guard} | as above |")
    return "\n".join(rows)


def compatibility() -> str:
    return COMPATIBILITY.format(
        versions="\n".join(f"| {version} | {ran} |" for version, ran in VERSIONS.items()),
        changes="\n".join(f"| {' | '.join(row)} |" for row in RELEASES),
        sections="\n\n".join(
            f"### `{file}`\n\n{shim_table(list(shims))}"
            for file, shims in itertools.groupby(read_shims(), key=lambda shim: shim.file)
        ),
    )


PAGES = {"configuration.md": configuration, "compatibility.md": compatibility}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for name, write in PAGES.items():
        path, text = ROOT / "docs" / name, write()
        if not args.check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            stale.append(name)
    print("\n".join(f"docs/{name} is not what the code says: run python -m tools.make_docs" for name in stale), end="")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
