"""A real ``vllm serve --diffusion`` process, over HTTP, with the openai client."""

import collections
import concurrent.futures
import json
import pathlib
import re
import subprocess
import time
import urllib.request

import openai
import pytest

from tests.demo_questions import LONG, OPEN, SHORT
from tests.harness.server import VLLM, read_metrics, vllm_server
from tools import make_readme
from vllm_twotower.commands.cli import DEMO_MODEL

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOR_THE_TESTS = ["--diffusion", '{"passes_per_step": 4}', "--max-num-seqs", "16"]
FOR_THE_TESTS += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """README's own command, and some settings that the tests below need."""
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(*make_readme.serve_arguments(README), *FOR_THE_TESTS, log=log, cwd=ROOT) as url:
        yield url, log


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def complete(client, prompt=LONG, xargs=None, extra_body=None, **more):
    settings = {"model": "demo", "prompt": prompt, "max_tokens": 40, "temperature": 0.0, **more}
    return client.completions.create(**settings, extra_body={"vllm_xargs": xargs or {}, **(extra_body or {})})


def metrics_of(server):
    """Name -> value, summed over labels; of requests that succeeded by their reason."""
    values = collections.Counter()
    for name, labels, value in re.findall(r"^(vllm:\w+)\{(.*)\} (\S+)$", read_metrics(server[0]), re.MULTILINE):
        reason = re.search(r'finished_reason="(\w+)"', labels)
        values[f"{name} {reason[1]}" if reason else name] += float(value)
    return values


def test_readmes_session(server):
    """Every command of README's server section prints what README says it prints; first, since it counts canvases."""
    shown = make_readme.list_commands(README)
    assert len(shown) == 4
    for command, printed in shown:
        assert printed.strip(), "README shows what a command prints"
        output = make_readme.run_command(command, server[0])
        assert make_readme.is_shown(printed, output), f"{command}\nprinted\n{output}\nnot\n{printed}"


def test_models_tokenize_and_health(server, client):
    assert [m.id for m in client.models.list()] == ["demo"]
    body = json.dumps({"model": "demo", "prompt": LONG}).encode()
    request = urllib.request.Request(f"{server[0]}/tokenize", body, {"Content-Type": "application/json"})
    assert json.load(urllib.request.urlopen(request))["count"] > 3


def test_streamed_text_equals_unstreamed_text_one_chunk_per_commit(client):
    whole = complete(client)
    assert whole.usage.completion_tokens == 40
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    texts = [c.choices[0].text for c in chunks if c.choices]
    assert "".join(texts) == whole.choices[0].text
    assert len([t for t in texts if t]) == 3, "16 + 16 + 8 tokens"
    assert chunks[-1].usage.completion_tokens == 40


def test_a_stop_string_across_two_canvases(client):
    text = complete(client).choices[0].text
    first_canvas = next(iter(complete(client, stream=True))).choices[0].text
    border = len(first_canvas)
    stop = text[border - 3 : border + 4]
    assert text.index(stop) == border - 3
    stopped = complete(client, stop=[stop])
    assert stopped.choices[0].text == text[: border - 3]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = list(complete(client, stop=[stop], stream=True))
    assert "".join(c.choices[0].text for c in streamed) == text[: border - 3]
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_end_of_sequence_ends_the_text(client):
    ended = complete(client, prompt=SHORT, max_tokens=200)
    assert ended.choices[0].finish_reason == "stop"
    assert 16 < ended.usage.completion_tokens < 96, "in a later canvas, an end that is counted"
    assert "</s>" not in ended.choices[0].text
    streamed = complete(client, prompt=SHORT, max_tokens=200, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == ended.choices[0].text
    longer = complete(client, prompt=SHORT, max_tokens=96, extra_body={"ignore_eos": True})
    assert longer.usage.completion_tokens == 96
    assert longer.choices[0].text.startswith(ended.choices[0].text)


def test_chat_asks_as_the_model_was_trained(client):
    """Its template begins with <s> and adds what a question ends in."""
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": SHORT.removesuffix("\nAnswer:")}],
        max_tokens=96,
        temperature=0.0,
    )
    whole = complete(client, prompt=SHORT, max_tokens=96)
    assert answer.usage.prompt_tokens == whole.usage.prompt_tokens
    assert answer.choices[0].message.content == whole.choices[0].text


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar", "ar"])
def test_modes_per_request(client, mode):
    answer = complete(client, xargs={"diffusion_mode": mode}, max_tokens=8)
    assert answer.usage.completion_tokens == 8


def test_structured_output_works_in_ar_and_is_refused_in_mask_diffusion(client):
    def choose(mode):
        return client.completions.create(
            model="demo",
            prompt=LONG,
            max_tokens=12,
            temperature=0.0,
            extra_body={"vllm_xargs": {"diffusion_mode": mode}, "structured_outputs": {"choice": ["yes", "no"]}},
        )

    assert choose("ar").choices[0].text in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="diffusion_mode='ar'"):
        choose("mask_diffusion")


def test_a_json_schema_in_ar(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": LONG}],
        max_tokens=60,
        temperature=0.0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        extra_body={"vllm_xargs": {"diffusion_mode": "ar"}},
    )
    person = json.loads(answer.choices[0].message.content)
    assert list(person) == ["name", "old"]
    assert isinstance(person["old"], bool)


def test_beam_search_in_ar_and_refused_in_mask_diffusion(client):
    def search(**xargs):
        extra = {"use_beam_search": True, "vllm_xargs": xargs}
        return client.completions.create(
            model="demo", prompt=LONG, n=2, max_tokens=4, temperature=0.0, extra_body=extra
        )

    assert len({c.text for c in search(diffusion_mode="ar").choices}) == 2
    for refused in ({}, {"diffusion_mode": "mask_diffusion"}, {"diffusion_mode": "mock_ar"}):
        with pytest.raises(openai.BadRequestError, match=r"beam search .* send diffusion_mode='ar'"):
            search(**refused)


def test_three_samples_of_one_prompt(client):
    drawn = {"prompt": OPEN, "temperature": 1.0, "max_tokens": 16, "extra_body": {"ignore_eos": True}}
    choices = complete(client, n=3, seed=7, **drawn).choices
    assert [c.index for c in choices] == [0, 1, 2]
    assert len({c.text for c in choices}) == 3
    for index, choice in enumerate(choices):  # vLLM gives sample i the seed + i
        assert complete(client, seed=7 + index, **drawn).choices[0].text == choice.text


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"diffusion_confidence_threshold": 2}, "diffusion_confidence_threshold=2"),
        ({"diffusion_max_steps": 0}, "from 1 to 1024"),
        ({"diffusion_canvas_length": 17}, "from 1 to 16"),
        ({"diffusion_mode": "fast"}, "mask_diffusion, mock_ar, self_speculation, ar"),
        ({"diffusion_speed": 9}, "unknown request setting"),
    ],
)
def test_bad_settings_are_a_400_and_the_next_request_is_fine(client, xargs, message):
    before = complete(client, max_tokens=16).choices[0].text
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, xargs=xargs)
    assert complete(client, max_tokens=16).choices[0].text == before


def test_a_prompt_of_one_token_is_a_400_in_mock_ar(client):
    with pytest.raises(openai.BadRequestError, match="send 2 tokens or more"):
        complete(client, prompt=[5], xargs={"diffusion_mode": "mock_ar"})
    assert complete(client, prompt=[5], max_tokens=4).usage.prompt_tokens == 1


def test_what_kills_stock_vllm_is_a_400(client):
    with pytest.raises(openai.BadRequestError, match="stop token ids"):
        client.completions.create(
            model="demo", prompt=LONG, extra_body={"stop_token_ids": list(range(4, 140)), "min_tokens": 1}
        )
    assert complete(client, max_tokens=4).usage.completion_tokens == 4


def test_logprobs_and_seeds_over_http(client):
    drawn = {"prompt": OPEN, "logprobs": 2, "max_tokens": 16, "temperature": 0.9, "extra_body": {"ignore_eos": True}}
    answer = complete(client, seed=5, **drawn)
    assert answer.usage.completion_tokens == 16
    assert len(answer.choices[0].logprobs.token_logprobs) == answer.usage.completion_tokens
    assert all(p <= 0 for p in answer.choices[0].logprobs.token_logprobs)
    assert complete(client, seed=5, **drawn).choices[0].text == answer.choices[0].text
    assert complete(client, seed=6, **drawn).choices[0].text != answer.choices[0].text
    scored = complete(client, echo=True, logprobs=1, max_tokens=1)
    assert len(scored.choices[0].logprobs.token_logprobs) > 4


def test_metrics_count_what_was_asked_for(server, client):
    before = metrics_of(server)
    complete(client, max_tokens=32, xargs={"diffusion_confidence_threshold": 1.0})
    time.sleep(1)
    grown = metrics_of(server) - before
    assert grown["vllm:twotower_canvases_total"] == 2
    assert grown["vllm:twotower_denoise_passes_total"] == 32
    assert grown["vllm:twotower_committed_tokens_total"] == 32
    assert grown["vllm:twotower_passes_per_canvas_count"] == 2


VLLMS = {
    "vllm:prompt_tokens_total": "prompt",
    "vllm:generation_tokens_total": "tokens",
    "vllm:request_prompt_tokens_sum": "prompt",
    "vllm:request_generation_tokens_sum": "tokens",
    "vllm:iteration_tokens_total_sum": "both",
    "vllm:time_to_first_token_seconds_count": "requests",
    "vllm:inter_token_latency_seconds_count": "gaps",
    "vllm:request_time_per_output_token_seconds_count": "requests",
    "vllm:e2e_request_latency_seconds_count": "requests",
    "vllm:request_queue_time_seconds_count": "requests",
    "vllm:request_decode_time_seconds_count": "requests",
}
"""What dashboards ask vLLM for, and what a client can count of it."""


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculation", "ar", "mock_ar"])
def test_vllms_metrics_say_what_a_client_got(server, client, mode):
    before, started = metrics_of(server), time.perf_counter()
    answers, first_tokens = [], []
    for prompt, more in ((LONG, {}), (OPEN, {"max_tokens": 7}), (SHORT, {"stop": "\n"}), (SHORT, {"max_tokens": 30})):
        asked_at = time.perf_counter()
        settings = {"stream": True, "stream_options": {"include_usage": True}, "xargs": {"diffusion_mode": mode}}
        chunks = []
        for chunk in complete(client, prompt, **settings, **more):
            if not any(c.choices for c in chunks):
                first_tokens.append(time.perf_counter() - asked_at)
            chunks.append(chunk)
        reason = next(c.choices[0].finish_reason for c in reversed(chunks) if c.choices)
        answers.append((chunks[-1].usage, reason))
    took = time.perf_counter() - started
    time.sleep(1)
    after = metrics_of(server)
    grown = after - before
    seen = collections.Counter(requests=len(answers))
    for usage, reason in answers:
        seen += {"prompt": usage.prompt_tokens, "tokens": usage.completion_tokens, f"reason {reason}": 1}
    seen["both"], seen["gaps"] = seen["prompt"] + seen["tokens"], seen["tokens"] - seen["requests"]
    assert {name: grown[name] for name in VLLMS} == {name: seen[of] for name, of in VLLMS.items()}
    for reason in ("stop", "length"):
        assert grown[f"vllm:request_success_total {reason}"] == seen[f"reason {reason}"], reason
    # seconds, which a client sees from further away
    waited = grown["vllm:time_to_first_token_seconds_sum"]
    between, decoding = (grown[f"vllm:{name}_seconds_sum"] for name in ("inter_token_latency", "request_decode_time"))
    assert 0 < waited <= sum(first_tokens)
    assert between == pytest.approx(decoding, abs=0.05)
    assert waited + between <= grown["vllm:e2e_request_latency_seconds_sum"] + 0.05 <= took + 0.1
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert after["vllm:num_requests_running"] == 0


def test_the_dashboard_asks_for_metrics_that_exist(server):
    panels = json.loads((ROOT / "examples" / "deploy" / "grafana" / "dashboard.json").read_text())["panels"]
    asked = {name for panel in panels for t in panel["targets"] for name in re.findall(r"vllm:\w+", t["expr"])}
    served = set(re.findall(r"^(vllm:\w+)", read_metrics(server[0]), re.MULTILINE))
    assert len(asked) > 12
    assert asked <= served, asked - served


def test_sixteen_different_requests_at_once_answer_as_alone(client):
    variants = [
        {},
        {"max_tokens": 5},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_p": 0.9},
        {"temperature": 1.0, "seed": 3, "extra": {"top_k": 20}},
        {"temperature": 1.0, "seed": 4, "extra": {"min_p": 0.05}},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 0.7},
        {"extra": {"repetition_penalty": 1.3}},
        {"logit_bias": {"15": 8}},
        {"stop": ["e"]},
        {"xargs": {"diffusion_confidence_threshold": 0.3}},
        {"xargs": {"diffusion_max_steps": 4}},
        {"xargs": {"diffusion_canvas_length": 8}},
        {"xargs": {"diffusion_mode": "ar"}, "max_tokens": 10},
        {"xargs": {"diffusion_mode": "mock_ar"}, "max_tokens": 10},
    ]

    def ask(variant):
        settings = {"model": "demo", "prompt": OPEN, "max_tokens": 20, "temperature": 0.0}
        extra = {"vllm_xargs": variant.get("xargs", {}), "ignore_eos": True, **variant.get("extra", {})}
        settings.update({k: v for k, v in variant.items() if k not in ("xargs", "extra")})
        return client.completions.create(**settings, extra_body=extra).choices[0].text

    alone = [ask(v) for v in variants]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, variants))
    assert together == alone
    assert len(set(alone)) > 8, "the parameters act"


def test_vllms_serving_benchmark_reads_the_server(server):
    command = [str(VLLM), "bench", "serve", "--model", "demo", "--tokenizer", str(DEMO_MODEL), "--base-url", server[0]]
    command += ["--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "16", "--ignore-eos"]
    result = subprocess.run([*command, "--num-prompts", "3"], capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    table = dict(line.split(":", 1) for line in result.stdout.splitlines() if line.count(":") == 1)
    assert int(table["Successful requests"]) == 3
    assert int(table["Total generated tokens"]) == 48


def test_the_log_holds_no_traceback(server):
    assert "Traceback" not in server[1].read_text()
