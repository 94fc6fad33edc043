"""The page that ``make conformance`` writes: counts by file and server, and every difference with its reason."""

import collections
import re

from benchmarks.machine import described, environment
from benchmarks.markdown_table import table
from benchmarks.paths import RESULTS
from tools.setup_next_vllm import NEXT_VLLM

Results = dict[str, dict[str, tuple[str, str]]]
"""By run, then by test: the outcome and its message."""

MODES = ("ar", "self_speculation", "mask_diffusion")
HEAD = """# vLLM's own API tests on the demo model

vLLM {version}'s tests of its HTTP API, from its source distribution, against four servers of the
[demo model](../../vllm_twotower/assets/demo/README.md): one without `--diffusion` (the control), and one in each mode.
Written by `{command}`; {machine}.

Unchanged but for this: every model's name is the demo model's, token ids beyond its 1,536 are others, the server that
a file would start is one that already runs and serves them all, and text completions of a given length ignore the end
of sequence (the demo model ends earlier than the models the tests count on). Whatever fails in the control as well
says nothing about this plugin: most of it counts tokens of another tokenizer or expects a model that can reason, call
functions, or count.

"""
LEFT_OUT = """## Left out

- Pictures, sound, pooling, adapters: this model has none.
- Files whose every test starts a server with other flags: `--root-path`, `--enable-force-include-usage`, `--uds`,
  SageMaker, Cohere's API, rendering servers, `--tool-server` (MCP, the responses API's parser context), tensorizer,
  correctness by lm-eval (`make lm-eval` does that).
- What this model has not whatever serves it: reasoning (thinking budgets, `include_reasoning`), the structured decision
  API; `test_chat_echo.py`, for which a server must return 151,936 log-probabilities.
- gpt-oss only: everything called harmony.
- `test_openai_schema.py`, which draws random requests from the schema: `make fuzz` does, with its own.
- Tests of parts that no request of a text model reaches (multimodal serde, weight transfer, elastic servers).
"""

REFUSAL = re.compile(
    r"(?P<setting>structured_outputs|logprob_token_ids|beam search)\b.*? (?P<why>cannot be honoured in .*?'ar'[\w ]*)",
    re.DOTALL,
)
CANVAS_OF_ENDS = (
    "the canvas behind the answer is all end-of-sequence tokens, which have no text; the test counts on text"
)
REASONS: dict[str, str] = {
    "test_metrics_counts": "the engine takes fewer steps than there are tokens, and the test counts one for each",
    "test_completion_streaming": CANVAS_OF_ENDS,
    "test_comparison_with_prompt_logprobs_and_logprobs": CANVAS_OF_ENDS,
    "test_generate_stream": "draws one answer at random and not the other, and expects them to be equally long",
    "test_function_calling_with_streaming": "refused like the others (structured output); what it got is how vLLM's "
    "responses API ends a stream whose request is refused, by breaking it off",
}
"""Why a test fails in a mode though the control passes, by a part of its name, where its message is no refusal."""


def count_outcomes(outcomes: dict[str, tuple[str, str]], file: str) -> str:
    """Passed, failed and skipped tests of a file."""
    found = collections.Counter(outcome for test, (outcome, _) in outcomes.items() if file_of(test) == file)
    return " / ".join(str(found[outcome]) for outcome in ("passed", "failed", "skipped"))


def file_of(test: str) -> str:
    return test.split("::")[0].removeprefix("tests/entrypoints/")


def shorten(text: str, length: int = 160) -> str:
    """One line that a table's cell can hold."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= length else line[: length - 3] + "..."


def find_reason(test: str, message: str) -> str | None:
    """Why a test may fail in a mode: the refusal it got, or what ``REASONS`` says."""
    if refusal := REFUSAL.search(message):
        return f"refused: {refusal['setting']} {refusal['why']}"
    return next((reason for part, reason in REASONS.items() if part in test), None)


def find_differences(results: Results) -> list[dict[str, str]]:
    """Every test that fails in a mode and passes in the control, a row for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for test, (outcome, _) in results["control"].items():
        for mode in MODES:
            outcome_here, message = results[mode].get(test, ("missing", "did not run"))
            if outcome == "passed" != outcome_here:
                reason = find_reason(test, message) or f"**no reason known**: {shorten(message)}"
                found.setdefault((test, reason), []).append(mode)
    return [
        {"test": shorten(test.split("/")[-1], 110), "fails in": ", ".join(modes), "because": reason}
        for (test, reason), modes in found.items()
    ]


def make_counts(results: Results, runs: tuple[str, ...]) -> list[str]:
    """Lines of the table of counts."""
    files = list(dict.fromkeys(file_of(test) for run in runs for test in results[run]))
    rows = [{"file": f"`{f}`", **{run: count_outcomes(results[run], f) for run in runs}} for f in files]
    totals = {}
    for run in runs:
        found = collections.Counter(outcome for outcome, _ in results[run].values())
        totals[run] = " / ".join(str(found[outcome]) for outcome in ("passed", "failed", "skipped"))
    return table([*rows, {"file": "all", **totals}])


def write_page(results: Results, version: str) -> int:
    """Write the page, and return how many differences have no reason."""
    page = RESULTS / f"conformance-{version}.md"
    command = "make conformance" + ("-next" if version == NEXT_VLLM else "")
    lines = [HEAD.format(version=version, command=command, machine=described(environment()))]
    lines += ["## Over HTTP: passed / failed / skipped", "", *make_counts(results, ("control", *MODES)), ""]
    differences = find_differences(results)
    failed = [(test, text) for test, (outcome, text) in results["control"].items() if outcome == "failed"]
    skipped = collections.Counter(m.removeprefix("Skipped: ") for o, m in results["control"].values() if o == "skipped")
    for title, rows in (
        ("Fails in a mode, passes in the control", differences),
        ("Fails in the control", [{"test": shorten(t.split("/")[-1], 110), "says": shorten(m)} for t, m in failed]),
        ("Skipped", [{"because": shorten(m), "tests": n} for m, n in skipped.most_common()]),
    ):
        lines += [f"## {title}", "", *(table(rows) if rows else ["None."]), ""]
    lines += ["## In one process, with a stand-in for the engine: passed / failed / skipped", ""]
    lines += ["With the plugin loaded, and with vLLM alone, which refuses the demo model's architecture.", ""]
    lines += [*make_counts(results, ("plugin", "no-plugin")), ""]
    found = {test: outcome for test, (outcome, _) in results["plugin"].items()}
    broken = [t for t, (outcome, _) in results["no-plugin"].items() if outcome == "passed" != found.get(t)]
    lines += ["Fails with the plugin and passes without: " + (", ".join(f"`{t}`" for t in broken) or "none") + ".", ""]
    page.write_text("\n".join([*lines, LEFT_OUT]), encoding="utf-8")
    unknown = sum("no reason known" in row["because"] for row in differences)
    print(
        f"{page.name}: {len(differences)} differences, {unknown} without a reason; {len(broken)} because of the plugin"
    )
    return unknown + len(broken)
