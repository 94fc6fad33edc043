"""Hostile HTTP requests, made from a seed: what a careless client, a broken proxy or an attacker may send to a server.

``hostile_requests(seed, count)`` begins with one request of every kind and goes on with random ones, so that a short
run sees every kind and a long one many of each. Requests that are answered cost 16 tokens at most, most cost nothing.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.demo_questions import SHORT

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
MAX_TOKENS = 4
MAX_MODEL_LEN = 512
LONG_PROMPT = [5] * (MAX_MODEL_LEN - 12)
"""Leaves room for 12 tokens: what is sent with a token limit of the client's own."""


@dataclass(frozen=True)
class Hostile:
    """One request, as bytes."""

    name: str
    path: str
    body: bytes
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    refusal: str | None = None
    """What the answer, a 400, has to say; None where any 4xx with a message and any correct 200 will do."""
    closed: bool = False
    """A path that nothing is served on; never a 200."""
    neutral: bool = False
    """What is odd about it has no say in the text: a 200 is answered as if it were not there."""


# ---- values ----------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
COMBINING = "e" + "\u0301" * 3000
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 50
RIGHT_TO_LEFT = "\u202e\u2066abc\u2069" * 20


def nested(depth: int, inner: Any = 1) -> Any:
    """Lists in lists."""
    for _ in range(depth):
        inner = [inner]
    return inner


BEYOND_64_BITS = 10**40
NUMBERS = [0, -1, 1, 2, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64]
NUMBERS += [BEYOND_64_BITS, 10**400]
FLOATS = [0.5, -0.0, -0.5, 1.5, 1e308, -1e308, 5e-324, 1e-9, NAN, INF, -INF]
STRINGS = ["", " ", "1", "abc", "\x00", "\ud800", "\udfff\ud800", COMBINING, FAMILY, RIGHT_TO_LEFT, "\ufffe\uffff"]
CONTAINERS = [[], {}, [[]], [None], [-1], [0], [3], [2**40], [10**40], ["x"], [""], ["\ud800"], [NAN], [True], [1.5]]
MORE_CONTAINERS = [{"a": 1}, {"": None}, {"1": NAN}, {"-1": 1}, {"5": INF}, {"99999": 1}, {"\ud800": 1}, {"x": {}}]
LARGE_CONTAINERS = [list(range(3000)), ["word"] * 3000, {str(i): 1.0 for i in range(3000)}, nested(50), nested(900)]
VALUES = [None, True, False, *NUMBERS, *FLOATS, *STRINGS, *CONTAINERS, *MORE_CONTAINERS, *LARGE_CONTAINERS]

# ---- our own settings: always refused --------------------------------------------------------------------------------

WRONG_SETTINGS: dict[str, list[Any]] = {
    "diffusion_mode": ["fast", "", "AR", "ar ", "mask_diffusion\x00", "\ud800", COMBINING, 0, 1, -1, 1.5, NAN, ["ar"]],
    "diffusion_max_steps": [0, -1, 1025, 2**31, 2**63, BEYOND_64_BITS, 1.5, 4.0, NAN, INF, "4", "", [4], []],
    "diffusion_canvas_length": [0, -1, 17, 2**31, BEYOND_64_BITS, 8.0, NAN, -INF, "8", "\x00", [8]],
    "diffusion_confidence_threshold": [0, -0.0, -1, 1.0001, 2, NAN, INF, -INF, 1e308, BEYOND_64_BITS, "0.8", "", [0.8]],
    "diffusion_": [1, "x"],
    "diffusion_speed": [9, NAN, "\ud800"],
    "diffusion_\ud800": [1],
    "diffusion_Mode": ["ar"],
}

# ---- vLLM's parameters -----------------------------------------------------------------------------------------------

INTEGERS = ["logprobs", "top_k", "min_tokens", "seed", "prompt_logprobs", "priority"]
MORE_INTEGERS = ["truncate_prompt_tokens", "thinking_token_budget", "stream_interval", "routed_experts_prompt_start"]
FRACTIONS = ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"]
FLAGS = ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "add_special_tokens", "watermarking"]
MORE_FLAGS = ["spaces_between_special_tokens", "return_token_ids", "return_tokens_as_token_ids", "use_beam_search"]
LISTS = ["stop", "stop_token_ids", "allowed_token_ids", "logprob_token_ids", "bad_words"]
MAPPINGS = ["logit_bias", "stream_options", "response_format", "structured_outputs", "repetition_detection"]
MORE_MAPPINGS = ["vllm_xargs", "kv_transfer_params", "ec_transfer_params"]
TEXTS = ["model", "user", "request_id", "session_id", "cache_salt", "truncation_side", "mm_payload"]
SHARED = [*INTEGERS, *MORE_INTEGERS, *FRACTIONS, "length_penalty", *FLAGS, *MORE_FLAGS, *LISTS, *MAPPINGS]
SHARED += [*MORE_MAPPINGS, *TEXTS, "n", "max_tokens", "echo", "stream"]
PARAMETERS = {
    COMPLETIONS: [*SHARED, "prompt", "suffix", "prompt_embeds", "a_new_parameter"],
    CHAT: [*SHARED, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "reasoning_effort"],
    TOKENIZE: ["prompt", "messages", "model", "add_special_tokens", "return_token_strs", "tools", "chat_template"],
    DETOKENIZE: ["tokens", "model", "a_new_parameter"],
}
PARAMETERS[CHAT] += [
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "continue_final_message",
    "add_generation_prompt",
]
PARAMETERS[CHAT] += ["parallel_tool_calls", "mm_processor_kwargs", "media_io_kwargs"]
NEUTRAL = {
    "user",
    "request_id",
    "session_id",
    "cache_salt",
    "seed",
    "stream_interval",
    "return_token_ids",
    "mm_payload",
}
NEUTRAL |= {"a_new_parameter", "kv_transfer_params", "ec_transfer_params", "top_k", "top_p", "min_p", "length_penalty"}
LIMITS = {"max_tokens", "max_completion_tokens"}


def base(path: str) -> dict[str, Any]:
    """A good request."""
    if path == COMPLETIONS:
        return {"model": "demo", "prompt": SHORT, "max_tokens": MAX_TOKENS, "temperature": 0.0}
    if path == CHAT:
        messages = [{"role": "user", "content": SHORT}]
        return {"model": "demo", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0.0}
    if path == TOKENIZE:
        return {"model": "demo", "prompt": SHORT}
    return {"model": "demo", "tokens": [5, 6, 7]}


def shorten(path: str, request: dict[str, Any], parameter: str) -> None:
    """Keep a request cheap whose token limit is not ours any more."""
    if parameter in LIMITS and path == COMPLETIONS:
        request["prompt"] = LONG_PROMPT
    elif parameter in LIMITS and path == CHAT:
        request["messages"] = [{"role": "user", "content": "the " * (len(LONG_PROMPT) // 2)}]
        request["ignore_eos"] = False


# ---- kinds of requests -----------------------------------------------------------------------------------------------

Kind = Callable[[random.Random], Hostile]


def as_json(request: Any) -> bytes:
    """With NaN and Infinity as Python's own parser takes them, and surrogates as escapes."""
    return json.dumps(request).encode("ascii")


def show(value: Any) -> str:
    """Short enough for a test's message."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**50 else "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."


def wrong_setting(key: str) -> Kind:
    def make(rng: random.Random) -> Hostile:
        path = rng.choice([COMPLETIONS, CHAT])
        value = rng.choice(WRONG_SETTINGS[key])
        body = as_json({**base(path), "vllm_xargs": {key: value}})
        # vLLM's own check of extra_args comes first
        refusal = "extra_args" if value == BEYOND_64_BITS else key if key.isascii() else "diffusion_"
        return Hostile(f"{path} {key!a}={show(value)}", path, body, refusal=refusal)

    return make


def wrong_parameter(path: str, parameter: str) -> Kind:
    def make(rng: random.Random) -> Hostile:
        value = rng.choice(VALUES)
        request = {**base(path), parameter: value}
        shorten(path, request, parameter)
        return Hostile(f"{path} {parameter}={show(value)}", path, as_json(request), neutral=parameter in NEUTRAL)

    return make


def several_wrong(rng: random.Random) -> Hostile:
    path = rng.choice([COMPLETIONS, CHAT])
    request, names = base(path), rng.sample(PARAMETERS[path], rng.randint(2, 5))
    for parameter in names:
        request[parameter] = rng.choice(VALUES)
        shorten(path, request, parameter)
    return Hostile(f"{path} {', '.join(f'{n}={show(request[n])}' for n in names)}", path, as_json(request))


def left_out(rng: random.Random) -> Hostile:
    path = rng.choice(list(PARAMETERS))
    request = base(path)
    name = rng.choice([n for n in request if n not in LIMITS])
    del request[name]
    return Hostile(f"{path} without {name}", path, as_json(request))


UNSATISFIABLE: list[Any] = [{"json": {"$ref": "#"}}, {"grammar": "root ::= root"}]
"""Grammars that no text fulfils."""
STRUCTURED: list[Any] = [
    *UNSATISFIABLE,
    {"regex": "("},
    {"regex": "a{1,99999}"},
    {"regex": "\ud800"},
    {"regex": ""},
    {"json": "{"},
    {"json": {"type": "nothing"}},
    {"json": {"$ref": "http://127.0.0.1:1/"}},
    {"json": {"type": "object", "properties": nested(3)}},
    {"json": nested(200)},
    {"choice": []},
    {"choice": ["", ""]},
    {"choice": ["\ud800"]},
    {"choice": [1]},
    {"grammar": "\x00"},
    {"structural_tag": "{}"},
    {"structural_tag": {"structures": [], "triggers": []}},
    {"json_object": False},
    {"regex": "a", "choice": ["b"]},
    {"what": "this"},
    {},
]


def structured(rng: random.Random) -> Hostile:
    path, wanted, mode = rng.choice([COMPLETIONS, CHAT]), rng.choice(STRUCTURED), rng.choice(["ar", "mask_diffusion"])
    body = as_json({**base(path), "structured_outputs": wanted, "vllm_xargs": {"diffusion_mode": mode}})
    return Hostile(f"{path} {mode} structured_outputs={show(wanted)}", path, body)


CONTENTS: list[Any] = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/hosts"}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]},
    {"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,////"}}]},
    {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "\ud800"}}]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": "\ud800"}]},
    {"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]},
    {"role": "user", "content": [{"type": "nothing"}]},
    {"role": "user", "content": None},
    {"role": "user", "content": 5},
    {"role": "user", "content": nested(400)},
    {"role": "user", "content": "</s>" * 100},
    {"role": "user", "content": COMBINING},
    {"role": "user", "content": "\x00"},
    {"role": "\ud800", "content": "x"},
    {"role": "", "content": ""},
    {"role": "tool", "content": "x", "tool_call_id": NAN},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]},
    {"role": "assistant", "tool_calls": [None]},
    {"content": "x"},
    {},
    None,
    "x",
]


def wrong_message(rng: random.Random) -> Hostile:
    message, many = rng.choice(CONTENTS), rng.choice([1, 1, 2, 300])
    body = as_json({**base(CHAT), "messages": [message] * many})
    return Hostile(f"{CHAT} {many} times {show(message)}", CHAT, body)


PROMPTS: list[Any] = [*STRINGS, [2**31], [1024], [1023] * 3, [0], [-1], [[5], []], [[5], "x"], ["x", 5], "x" * 20_000]
PROMPTS += [[5] * 511, [5] * 512, [5] * 513, [5] * 100_000, "\x00" * 100, "\ud800" * 100, "x" * 1_000_000, ["", "\x00"]]


def wrong_prompt(rng: random.Random) -> Hostile:
    prompt = rng.choice(PROMPTS)
    mode = rng.choice(["ar", "mask_diffusion", "mock_ar", "self_speculation"])
    body = as_json({**base(COMPLETIONS), "prompt": prompt, "vllm_xargs": {"diffusion_mode": mode}})
    return Hostile(f"{COMPLETIONS} {mode} prompt={show(prompt)}", COMPLETIONS, body)


TEMPLATES = ["{{ 1/0 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ ''.__class__.__mro__ }}", "{%", "\ud800", ""]


def chat_template(rng: random.Random) -> Hostile:
    template, path = rng.choice(TEMPLATES), rng.choice([CHAT, TOKENIZE])
    request = {**base(CHAT), "chat_template": template}
    return Hostile(f"{path} chat_template={show(template)}", path, as_json(request))


# ---- bytes -----------------------------------------------------------------------------------------------------------


def broken(rng: random.Random) -> Hostile:
    path = rng.choice([COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE])
    good = as_json(base(path))
    cut = rng.randrange(1, len(good) - 1)
    byte = rng.randrange(len(good) - 1)
    bodies = {
        "cut": good[:cut],
        "a byte flipped": good[:byte] + bytes([good[byte] ^ 1 << rng.randrange(8)]) + good[byte + 1 :],
        "with more after it": good + b"}",
        "twice": good + good,
        "UTF-16": good.decode().encode("utf-16"),
        "with a byte-order mark": b"\xef\xbb\xbf" + good,
        "not UTF-8": good.replace(b"demo", b"\xff\xfe\x80"),
        "in single quotes": good.replace(b'"', b"'"),
        "with a comment": b"/* */" + good,
        "with a comma too many": good[:-1] + b",}",
        "random bytes": rng.randbytes(200),
    }
    name = rng.choice(list(bodies))
    return Hostile(f"{path} body {name} ({cut}, {byte})", path, bodies[name])


NOT_OBJECTS = [b"", b"null", b"[]", b"42", b'"x"', b"true", b"NaN", b"-Infinity", b"\x00", b"{", b"{}", b"[{}]"]


def not_an_object(rng: random.Random) -> Hostile:
    path, body = rng.choice(list(PARAMETERS)), rng.choice(NOT_OBJECTS)
    return Hostile(f"{path} body {body!r}", path, body)


def deep(rng: random.Random) -> Hostile:
    path, depth = rng.choice([COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE]), rng.choice([500, 5_000, 100_000])
    place = rng.choice(
        ["prompt", "messages", "tokens", "vllm_xargs", "logit_bias", "stop", "chat_template_kwargs", None]
    )
    start, end = rng.choice([("[", "]"), ('{"a":', "}")])
    value = start * depth + "1" + end * depth
    good = as_json(base(path)).decode()
    body = value if place is None else f'{good[:-1]}, "{place}": {value}}}'
    return Hostile(f"{path} {place} {depth} deep", path, body.encode())


def large(rng: random.Random) -> Hostile:
    path = rng.choice([COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE])
    requests: dict[str, Any] = {
        "unknown key of 4 MB": {**base(path), "x": "y" * 4_000_000},
        "50,000 unknown keys": {**base(path), **{f"key{i}": i for i in range(50_000)}},
        "100,000 stop strings": {**base(path), "stop": ["x"] * 100_000},
        "100,000 stop ids": {**base(path), "stop_token_ids": list(range(100_000))},
        "100,000 biases": {**base(path), "logit_bias": {str(i): 1 for i in range(100_000)}},
        "200,000 settings": {**base(path), "vllm_xargs": {f"x{i}": i for i in range(200_000)}},
        "a setting of 4 MB": {**base(path), "vllm_xargs": {"diffusion_mode": "x" * 4_000_000}},
        "a huge bad word": {**base(path), "bad_words": ["x" * 100_000]},
    }
    name = rng.choice(list(requests))
    return Hostile(f"{path} {name}", path, as_json(requests[name]))


CONTENT_TYPES = [
    "text/plain",
    "application/xml",
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
]
CONTENT_TYPES += [
    "",
    "application/json; charset=utf-16",
    "application/octet-stream",
    "json",
    "\xff",
    "application/json/" * 50,
]


def content_type(rng: random.Random) -> Hostile:
    path, kind = rng.choice(list(PARAMETERS)), rng.choice(CONTENT_TYPES)
    return Hostile(f"{path} as {show(kind)}", path, as_json(base(path)), headers={"Content-Type": kind})


HEADERS = [{"X-Request-Id": "\xff" * 100}, {"X-Request-Id": "x-beam-0"}, {"Authorization": "Bearer " + "x" * 5000}]
HEADERS += [
    {"Content-Encoding": "gzip"},
    {"X-data-parallel-rank": "99"},
    {"Accept": "text/html"},
    {"traceparent": "0-0-0"},
]
HEADERS += [
    {"X-data-parallel-rank": "x"},
    {"Transfer-Encoding": "gzip"},
    {"X-Session-ID": "\xff"},
    {"Expect": "100-continue"},
]


def headers(rng: random.Random) -> Hostile:
    path, extra = rng.choice([COMPLETIONS, CHAT]), rng.choice(HEADERS)
    more = {"Content-Type": "application/json", **extra}
    return Hostile(f"{path} with {show(extra)}", path, as_json(base(path)), headers=more, neutral=True)


METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "NOTHING"]


def method(rng: random.Random) -> Hostile:
    path, verb = rng.choice(list(PARAMETERS)), rng.choice(METHODS)
    return Hostile(f"{verb} {path}", path, as_json(base(path)), method=verb)


CLOSED = ["/collective_rpc", "/sleep", "/wake_up", "/reset_prefix_cache", "/server_info", "/pause", "/update_weights"]
CLOSED += [
    "/inference/v1/generate",
    "/v1/load_lora_adapter",
    "/start_profile",
    "/init_weight_transfer_engine",
    "/../etc/passwd",
    "/%2e%2e/",
    "/v1",
]
CLOSED += ["//v1/completions", "/v1/completions%00", "/v1/embeddings", "/pooling", "/score"]


def closed_path(rng: random.Random) -> Hostile:
    path, verb = rng.choice(CLOSED), rng.choice(["POST", "GET"])
    body = as_json({"method": "diffusion_stats", "args": [True]})
    return Hostile(f"{verb} {path}", path, body, method=verb, closed=True)


BYTES: list[Kind] = [broken, not_an_object, deep, large, content_type, headers, method, closed_path]
MEANINGS: list[Kind] = [several_wrong, left_out, structured, wrong_message, wrong_prompt, chat_template]
OURS: list[Kind] = [wrong_setting(key) for key in WRONG_SETTINGS]
THEIRS: list[Kind] = [wrong_parameter(path, name) for path, names in PARAMETERS.items() for name in names]


def hostile_requests(seed: int, count: int) -> Iterator[Hostile]:
    """One of every kind, as far as ``count`` goes, then random ones; the same for the same seed.

    In a short run every parameter is wrong once, on an endpoint that the seed chooses; a longer one has every pair.
    """
    rng = random.Random(seed)
    first = [*BYTES, *MEANINGS, *OURS, *[wrong_parameter(rng.choice([COMPLETIONS, CHAT]), name) for name in SHARED]]
    rest = [kind for kind in THEIRS if kind not in first]
    rng.shuffle(rest)
    for kind in [*first, *rest][:count]:
        yield kind(rng)
    for _ in range(count - len(first) - len(rest)):
        yield rng.choice(rng.choice([BYTES, MEANINGS, OURS, THEIRS, THEIRS]))(rng)
