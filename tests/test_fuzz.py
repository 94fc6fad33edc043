"""Hostile HTTP requests against a real server: a refusal with a message or a correct answer, and nobody else notices.

``make fuzz`` sends 2,000 from a new seed; ``FUZZ_REQUESTS`` and ``FUZZ_SEED`` choose.
"""

import concurrent.futures
import http.client
import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.demo_questions import LONG, OPEN, SHORT
from tests.harness.server import read_metrics, vllm_server
from tests.hostile_requests import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    TOKENIZE,
    UNSATISFIABLE,
    Hostile,
    base,
    hostile_requests,
)
from vllm_twotower.commands.cli import DEMO_MODEL

NUM_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "150"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
ANSWER_SECONDS = 120
MOST_TOKENS = 16
REFUSALS = {400, 401, 403, 404, 405, 411, 413, 415, 422}
OPTIONS = ["--diffusion", '{"passes_per_step": 16}', "--served-model-name", "demo", "--dtype", "float32"]
OPTIONS += ["--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(DEMO_MODEL, *OPTIONS, log=log) as url:
        yield url, log


@dataclass(frozen=True)
class Answer:
    status: int
    content_type: str
    body: bytes


def send(url: str, request: Hostile) -> Answer:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=ANSWER_SECONDS)
    headers = {name: value.encode("latin-1") for name, value in request.headers.items()}
    try:
        connection.request(request.method, request.path, request.body, headers)
        response = connection.getresponse()
        return Answer(response.status, response.getheader("Content-Type", ""), response.read())
    finally:
        connection.close()


# ---- what may come back ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownDefect:
    """A 500 of vLLM's own that has nothing to do with this plugin; each has a death test below."""

    where: str
    answer: str
    """The message, as a regular expression."""
    sent: Callable[[Any], bool]
    """Whether a request can run into it."""
    logged: str | None
    """The last line of the traceback that vLLM's web server logs for it, as a regular expression."""


NO_GET = r"'\w+' object has no attribute 'get'"
KNOWN_DEFECTS = (
    KnownDefect(
        "structured_outputs is not an object: openai/*/protocol.py calls .get on it",
        NO_GET,
        lambda sent: not isinstance(sent.get("structured_outputs"), dict),
        f"AttributeError: {NO_GET}",
    ),
    KnownDefect(
        "a grammar that no text fulfils: v1/core/sched/scheduler.py ends the request, with an error of its own",
        "Internal server error",
        lambda sent: sent.get("structured_outputs") in UNSATISFIABLE,
        None,
    ),
)


def known_defect(request: Hostile, answer: Answer) -> KnownDefect | None:
    if answer.status != 500 or request.path not in (COMPLETIONS, CHAT):
        return None
    sent, message = json.loads(request.body), json.loads(answer.body)["error"]["message"]
    return next((d for d in KNOWN_DEFECTS if re.fullmatch(d.answer, message) and d.sent(sent)), None)


def problem(request: Hostile, answer: Answer, good_texts: dict[str, str]) -> str | None:
    """What is wrong with an answer, or None."""
    if request.refusal is not None:
        told = answer.status == 400 and request.refusal in json.loads(answer.body)["error"]["message"]
        return None if told else f"not a 400 that names {request.refusal}"
    if answer.status in REFUSALS:
        return None if request.method == "HEAD" or has_message(answer) else "no message"
    if answer.status == 200 and not request.closed:
        return wrong_answer(request, answer, good_texts)
    return None if known_defect(request, answer) else "neither an answer nor a refusal"


def has_message(answer: Answer) -> bool:
    if not answer.content_type.startswith("application/json"):  # the HTTP parser's own, before any application
        return bool(answer.body.strip())
    body = json.loads(answer.body)
    return bool(body["error"]["message"] if "error" in body else body["detail"])


def wrong_answer(request: Hostile, answer: Answer, good_texts: dict[str, str]) -> str | None:
    if request.path in (TOKENIZE, DETOKENIZE):
        body = json.loads(answer.body)
        return None if "tokens" in body or "prompt" in body else "neither tokens nor a prompt"
    if answer.content_type.startswith("text/event-stream"):
        *events, last = [e.removeprefix(b"data: ") for e in answer.body.split(b"\n\n") if e.strip()]
        chunks = [json.loads(e) for e in events]
        if last != b"[DONE]" or any("error" in c and c["error"]["code"] not in REFUSALS for c in chunks):
            return "a stream that breaks off"
        return None
    body = json.loads(answer.body)
    choices = body["choices"]
    if not choices or any(c["finish_reason"] not in ("stop", "length", "repetition") for c in choices):
        return "no choices, or unfinished ones"
    if not 0 <= body["usage"]["completion_tokens"] <= MOST_TOKENS * len(choices):
        return "more tokens than asked for"
    text = choices[0]["text"] if request.path == COMPLETIONS else choices[0]["message"]["content"]
    if request.neutral and text != good_texts[request.path]:
        return "not the text of the same request without it"
    return None


# ---- requests of others ----------------------------------------------------------------------------------------------


def complete(url: str, **more: Any) -> str:
    request = urllib.request.Request(
        f"{url}{COMPLETIONS}", json.dumps({**base(COMPLETIONS), **more}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        return json.load(answer)["choices"][0]["text"]


DRAWN = {"prompt": OPEN, "ignore_eos": True, "temperature": 0.8, "seed": 7}
GOOD = [{"max_tokens": 20}, {"max_tokens": 20, **DRAWN}]
GOOD += [{"max_tokens": 8, "vllm_xargs": {"diffusion_mode": mode}} for mode in ("ar", "mock_ar", "self_speculation")]


def chat(url: str, **more_headers: str) -> str:
    headers = {"Content-Type": "application/json", **more_headers}
    answer = send(url, Hostile("", CHAT, json.dumps(base(CHAT)).encode(), headers=headers))
    return json.loads(answer.body)["choices"][0]["message"]["content"]


def good_answers(url: str) -> list[str]:
    return [complete(url, **settings) for settings in GOOD]


def gauges(url: str) -> dict[str, float]:
    text = read_metrics(url)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    found = {name: re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in names}
    return {name: float(match[1]) for name, match in found.items()}


def tracebacks(log: str) -> list[str]:
    """The last line of every traceback."""
    after = (part.splitlines()[1:] for part in log.split("Traceback (most recent call last):")[1:])
    return [next(line for line in lines if re.match(r"\S*\w+(Error|Exception)\b", line)) for lines in after]


def test_hostile_requests_are_refused_or_answered_and_nobody_else_notices(server):
    url, log = server
    print(f"FUZZ_SEED={SEED} FUZZ_REQUESTS={NUM_REQUESTS}")
    before, good_texts = good_answers(url), {COMPLETIONS: complete(url), CHAT: chat(url)}
    requests = list(hostile_requests(SEED, NUM_REQUESTS))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(send, url, request) for request in requests]
        num_good = 0
        while not all(answer.done() for answer in answers):
            which = num_good % len(GOOD)
            assert complete(url, **GOOD[which]) == before[which]
            num_good += 1
    assert num_good > 0
    failures, statuses, known = [], {}, []
    for request, future in zip(requests, answers, strict=True):
        answer = future.result()
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        known += [d for d in [known_defect(request, answer)] if d is not None]
        if wrong := problem(request, answer, good_texts):
            failures.append(f"{request.name}: {answer.status}, {wrong}: {answer.body[:300]!r}")
    print(f"answers by status {statuses}, {len(known)} known defects, {num_good} good requests in between")
    assert not failures, "\n".join(failures)
    assert good_answers(url) == before
    assert gauges(url) == {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
    logged = tracebacks(log.read_text(errors="replace"))
    expected = [d.logged for d in known if d.logged is not None]
    assert len(logged) == len(expected), logged
    assert all(re.fullmatch(line, last) for line, last in zip(expected, logged, strict=True)), logged


def test_a_client_that_stops_in_the_middle_of_its_request_is_forgotten(server):
    url, _ = server
    before, address = complete(url), (urllib.parse.urlsplit(url).hostname, urllib.parse.urlsplit(url).port)
    body = json.dumps(base(COMPLETIONS)).encode()
    whole = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    starts = [
        whole[:20],
        whole + b"9999\r\n\r\n" + body,
        whole + b"-5\r\n\r\n" + body,
        b"\x16\x03\x01\x00",
        b"\r\n" * 9,
    ]
    starts += [whole + b"%d\r\n\r\n" % len(body) + body, b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000]
    for start in starts * 3:
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(start)
    assert complete(url) == before


@pytest.mark.parametrize("name", ["a-beam-0", "9b1deb4d3b7d4bad-beam-12"])
def test_a_request_that_calls_itself_a_beam_is_decoded_as_asked(server, name):
    assert chat(server[0], **{"X-Request-Id": name}) == chat(server[0])


def test_a_beam_search_leaves_no_mark_on_its_connection(server):
    """What comes next on it is decoded as asked, not in the ``ar`` of the beams."""
    expected = chat(server[0])
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server[0]).netloc, timeout=ANSWER_SECONDS)

    def ask(path, **more):
        connection.request("POST", path, json.dumps({**base(path), **more}), {"Content-Type": "application/json"})
        return json.load(connection.getresponse())["choices"]

    search = {"prompt": [SHORT, LONG], "n": 2, "max_tokens": 3, "use_beam_search": True}
    assert len({c["text"] for c in ask(COMPLETIONS, **search, vllm_xargs={"diffusion_mode": "ar"})}) == 4
    assert ask(CHAT)[0]["message"]["content"] == expected
    connection.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", ["\ud800"]), ("bad_words", ["\ud800"]), ("stream_interval", 10**40), ("request_id", "\ud800")],
)
def test_what_cannot_be_sent_to_the_engine_is_a_400_that_names_it(server, name, value):
    request = Hostile("", COMPLETIONS, json.dumps({**base(COMPLETIONS), name: value}).encode(), refusal=name)
    assert problem(request, send(server[0], request), {}) is None


# ---- vLLM still has the defects that are excused above ---------------------------------------------------------------


def test_vllm_still_trips_over_structured_outputs_that_are_no_object():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for request_type in (CompletionRequest, ChatCompletionRequest):
        with pytest.raises(AttributeError, match=NO_GET):
            request_type.model_validate({"prompt": "x", "messages": [], "structured_outputs": [1]})


def test_vllm_still_admits_grammars_that_no_text_fulfils():
    import xgrammar
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    tokens = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(DEMO_MODEL), vocab_size=1536)
    compiler, mask = xgrammar.GrammarCompiler(tokens), xgrammar.allocate_token_bitmask(1, 1536)
    for sent in UNSATISFIABLE:
        validate_xgrammar_grammar(SamplingParams(structured_outputs=StructuredOutputsParams(**sent)))
        is_json = "json" in sent
        compiled = (
            compiler.compile_json_schema(json.dumps(sent["json"]))
            if is_json
            else compiler.compile_grammar(sent["grammar"])
        )
        xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)
        assert not mask.any(), f"{sent} allows a token"
