"""One client of ``soak.py``: sends a request as its fate says and notes what came back."""

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.soak_requests import CHAT, Request

ANSWER_SECONDS = 1200


@dataclass
class Outcome:
    """What happened to one request."""

    request: Request
    texts: list[str] | None = None
    """By choice; None unless it was answered to its end."""
    num_tokens: int = 0
    seconds: float = 0.0
    problem: str | None = None


def ask(client: httpx.Client, request: Request) -> Outcome:
    outcome, started = Outcome(request), time.monotonic()
    try:
        (streamed if request.stream else whole)(client, request, outcome)
    except (httpx.HTTPError, KeyError, ValueError) as problem:
        outcome.problem = f"{type(problem).__name__}: {problem}"
    outcome.seconds = time.monotonic() - started
    return outcome


def whole(client: httpx.Client, request: Request, outcome: Outcome) -> None:
    answer = client.post(request.path, json=request.body)
    if request.refusal is not None:
        if answer.status_code != 400 or request.refusal not in answer.text:
            outcome.problem = f"{answer.status_code} instead of a 400 with {request.refusal!r}: {answer.text[:300]}"
        return
    if answer.status_code != 200:
        outcome.problem = f"{answer.status_code}: {answer.text[:300]}"
        return
    body = answer.json()
    if any(choice["finish_reason"] not in ("stop", "length") for choice in body["choices"]):
        outcome.problem = f"not finished: {answer.text[:300]}"
    outcome.texts = [text_of(request, c, "message") for c in sorted(body["choices"], key=lambda c: c["index"])]
    outcome.num_tokens = body["usage"]["completion_tokens"]


def streamed(client: httpx.Client, request: Request, outcome: Outcome) -> None:
    texts, finished = [""] * request.body["n"], 0
    num_chunks, body = 0, {**request.body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", request.path, json=body) as answer:
        if answer.status_code != 200:
            outcome.problem = f"{answer.status_code}: {answer.read()[:300]!r}"
            return
        for line in answer.iter_lines():
            if request.leave_after is not None and num_chunks >= request.leave_after:
                return
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk["choices"]:
                num_chunks += 1
                texts[choice["index"]] += text_of(request, choice, "delta")
                finished += choice["finish_reason"] in ("stop", "length")
            if usage := chunk.get("usage"):
                outcome.num_tokens = usage["completion_tokens"]
    if finished != len(texts):
        outcome.problem = f"{finished} of {len(texts)} choices finished"
    outcome.texts = texts


def text_of(request: Request, choice: dict[str, Any], where: str) -> str:
    return (choice[where].get("content") or "") if request.path == CHAT else choice["text"]
