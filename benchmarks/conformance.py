"""vLLM's own API tests against the demo model, in every mode: ``make conformance``.

Fetches the source distribution of the installed vLLM, and runs its tests of the text API against four servers: one
without ``--diffusion`` (the control), and one in each mode. Nothing of theirs is changed but the models' names, and
the servers that they start, which become one that already runs (``conformance_parts/redirect.py``). Writes
``benchmarks/results/conformance-<version>.md`` and fails if a test fails without a reason where the control passes.
"""

import argparse
import json
import os
import pathlib
import subprocess

from benchmarks.conformance_parts.report import write_page
from benchmarks.conformance_parts.sources import MODEL, prepare_python, prepare_tests
from benchmarks.paths import ROOT
from tests.harness.server import vllm_server
from tools.vllm_source import VERSION

FOLDER = ROOT / ".venv" / "conformance" / VERSION
"""Everything fetched and every raw result; ignored by git."""
TESTS = pathlib.PurePosixPath("tests/entrypoints")

SERVERS = {
    "control": [],
    "ar": ["--diffusion", '{"mode": "ar"}'],
    "self_speculation": ["--diffusion", '{"mode": "self_speculation"}'],
    "mask_diffusion": ["--diffusion", '{"passes_per_step": 4}'],
}
OPTIONS = ["--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", "16", "--enforce-eager"]
OPTIONS += ["--hf-overrides", '{"max_position_embeddings": 8192}']  # tests expect that length; it has no positions
OPTIONS += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-chunked-prefill"]
OPTIONS += ["--enable-tokenizer-info-endpoint", "--enable-scale-out", "--enable-prompt-tokens-details"]
OPTIONS += ["--enable-server-load-tracking", "--enable-prompt-embeds"]
OPTIONS += ["--override-generation-config", '{"max_new_tokens": 128}']  # it may not know when to stop
OPTIONS += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']  # nor in JSON
OPTIONS += ["--served-model-name", MODEL, "claude-3-7-sonnet-latest"]  # that one is asked for by name
ENVIRONMENT = {"VLLM_ENABLE_RESPONSES_API_STORE": "1", "VLLM_SERVER_DEV_MODE": "1"}

OVER_HTTP = """
serve/instrumentator/test_metrics.py
serve/instrumentator/test_basic.py
serve/instrumentator/test_orca_metrics.py
serve/tokenize/test_tokenization.py
openai/models/test_models.py
openai/completion/test_completion.py
openai/completion/test_prompt_validation.py
openai/chat_completion/test_chat.py
openai/chat_completion/test_chat_completion.py
openai/chat_completion/test_batched_chat_completions.py
openai/chat_completion/test_chat_logit_bias_validation.py
openai/chat_completion/test_completion_with_function_calling.py
openai/chat_completion/test_logprob_token_ids.py
openai/responses/test_basic.py
openai/responses/test_errors.py
openai/responses/test_function_call.py
openai/responses/test_stateful.py
openai/responses/test_structured_output.py
openai/test_chunked_prompt.py
openai/test_return_token_ids.py
openai/test_return_tokens_as_ids.py
anthropic/test_messages.py
generate/generative_scoring/test_generative_scoring_e2e.py
scale_out/token_in_token_out/test_serving_tokens.py
""".split()
"""Files that talk to a server. The metrics first: they count from the server's start."""

IN_PROCESS = """
openai/completion/test_completion_error.py
openai/completion/test_completion_text_offset.py
openai/chat_completion/test_chat_error.py
openai/chat_completion/test_message_assembly.py
openai/chat_completion/test_non_object_body_validation.py
openai/chat_completion/test_serving_chat.py
openai/chat_completion/test_stream_processor.py
openai/chat_completion/test_thinking_token_budget_validation.py
openai/responses/test_function_call_parsing.py
openai/responses/test_protocol.py
openai/responses/test_responses_utils.py
openai/responses/test_sampling_params.py
openai/responses/test_serving_responses.py
openai/responses/test_streaming_events.py
openai/test_penalty_default_resolution.py
openai/test_reasoning_enable_thinking.py
openai/test_render_parity.py
openai/test_render_token_offsets.py
openai/test_session_id.py
openai/test_stop_token_ids.py
openai/test_tool_calls_serialization.py
openai/test_tool_choice_content_none.py
openai/test_watermarking.py
anthropic/test_anthropic_messages_conversion.py
anthropic/test_error_type_mapping.py
anthropic/test_protocol_exports.py
serve/tokenize/test_serving_tokenization.py
serve/exception_handling/test_error_sanitization.py
serve/exception_handling/test_http_status_metrics.py
serve/exception_handling/test_validation_exception_handler.py
generate/generative_scoring/test_generative_scoring.py
generate/structured_decisions/test_question_types.py
generate/structured_decisions/test_strategies.py
scale_out/token_in_token_out/test_generate_stream.py
scale_out/token_in_token_out/test_protocol.py
scale_out/token_in_token_out/test_tokens_logprobs.py
""".split()
"""Files that call the server's parts with a stand-in for the engine: run with the plugin loaded, and without."""


LEFT_OUT = "not lora and not multimodal and not enable-chunked-prefill"
"""Adapters, pictures, and the counts from a server's start once more."""


def run_tests(python: pathlib.Path, tests: pathlib.Path, files: list[str], name: str, more_env: dict[str, str]) -> None:
    """Run vLLM's test files; results go to ``name``.json, output to ``name``.log."""
    env = {**os.environ, **more_env, "PYTHONPATH": f"{tests}:{ROOT}", "VLLM_LOGGING_LEVEL": "ERROR"}
    env["HF_HUB_OFFLINE"] = "1"  # tests that want other models' files fail at once, wherever they run
    env["CONFORMANCE_RESULT"] = str(FOLDER / f"{name}.json")
    command = [python, "-m", "pytest", "-p", "benchmarks.conformance_parts.redirect", "-p", "no:cacheprovider"]
    command += ["-c", tests / "pyproject.toml", "--continue-on-collection-errors"]
    command += ["--timeout", "60", "--tb", "short", "-rf", "-k", LEFT_OUT]
    with (FOLDER / f"{name}.log").open("wb") as log:
        command += [str(TESTS / file) for file in files if (tests / TESTS / file).exists()]
        subprocess.run(command, cwd=tests, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)


def run_against_server(python: pathlib.Path, tests: pathlib.Path, files: list[str], server: str) -> None:
    """Run the files that talk to a server against one, which serves them all."""
    options = [*OPTIONS, *SERVERS[server]]
    os.environ.update(ENVIRONMENT)
    with vllm_server(MODEL, *options, log=FOLDER / f"{server}-server.log", cwd=tests) as url:
        described = {"CONFORMANCE_SERVER": url, "CONFORMANCE_ENV": json.dumps(ENVIRONMENT)}
        described["CONFORMANCE_FLAGS"] = json.dumps([word for word in options if word.startswith("--")])
        run_tests(python, tests, files, server, described)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SERVERS, "plugin", "no-plugin"]
    parser.add_argument("--only", nargs="*", default=names, choices=names, help="the others keep their last result")
    parser.add_argument("--files", nargs="*", help="run these alone, and write no page")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    tests, python = prepare_tests(FOLDER, VERSION), prepare_python(FOLDER)
    for file in [*OVER_HTTP, *IN_PROCESS]:
        if not (tests / TESTS / file).exists():
            print(f"vLLM {VERSION} has no {file}")
    for name in args.only:
        print(name, flush=True)
        if name in SERVERS:
            run_against_server(python, tests, args.files or OVER_HTTP, name)
        else:
            more_env = {"VLLM_PLUGINS": ""} if name == "no-plugin" else {}
            run_tests(python, tests, args.files or IN_PROCESS, name, more_env)
    raw = {name: FOLDER / f"{name}.json" for name in names}
    if args.files or not all(path.exists() for path in raw.values()):
        print("no page: not everything has run")
    else:
        results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in raw.items()}
        raise SystemExit(write_page(results, VERSION))


if __name__ == "__main__":
    main()
