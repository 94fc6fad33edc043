"""A pytest plugin for vLLM's own tests: their servers are one that already runs, and what came out is written down.

Runs in vLLM's unpacked tests, so ``tests`` is theirs. A test that asks for a server with a flag or an environment
that the running one does not have, and that matters, is skipped and says so.
"""

import functools
import inspect
import json
import os
import pathlib
import urllib.parse

import httpx
import pytest
import requests
import tests.utils
import vllm.transformers_utils.repo_utils
from vllm.plugins import load_general_plugins

SERVER = urllib.parse.urlsplit(os.environ.get("CONFORMANCE_SERVER", ""))
SERVER_FLAGS = set(json.loads(os.environ.get("CONFORMANCE_FLAGS", "[]")))
SERVER_ENV = json.loads(os.environ.get("CONFORMANCE_ENV", "{}"))
RESULT = pathlib.Path(os.environ["CONFORMANCE_RESULT"])

IMMATERIAL = {
    # sizes and speed
    *("--dtype", "--max-model-len", "--max-num-seqs", "--enforce-eager", "--gpu-memory-utilization", "--load-format"),
    # how the prompt is cached and cut; answers do not depend on it
    *("--enable-prefix-caching", "--no-enable-prefix-caching", "--max-num-batched-tokens"),
    # adapters, whose tests are left out
    *("--enable-lora", "--lora-modules", "--max-lora-rank", "--max-cpu-loras"),
    # the demo model writes no reasoning to take apart
    "--reasoning-parser",
    # their defaults do the same here
    *("--structured-outputs-config.backend", "--no-async-scheduling"),
}


class RunningServer(tests.utils.RemoteOpenAIServer):
    """Stands in for the server that a test would start."""

    def __init__(self, model, vllm_serve_args, *, env_dict=None, **others):
        asked = {word.split("=")[0] for word in vllm_serve_args if word.startswith("--")}
        missing = sorted(asked - IMMATERIAL - SERVER_FLAGS)
        missing += sorted(f"{k}={v}" for k, v in (env_dict or {}).items() if SERVER_ENV.get(k, os.environ.get(k)) != v)
        if missing:
            pytest.skip("wants a server of its own: " + " ".join(missing))
        self.uds, self.host, self.port = None, SERVER.hostname, SERVER.port
        self.show_hidden_metrics = False

    def get_async_client(self, **kwargs):
        return write_to_the_end(super().get_async_client(**kwargs))

    def get_client(self, **kwargs):
        return write_to_the_end(super().get_client(**kwargs))

    def _shutdown(self):
        """It goes on."""


def write_to_the_end(client):
    """An openai client whose text completions of a given length get that length.

    The tests count the tokens of models that have more to say in ten tokens than the demo model.
    """
    client.completions.create = functools.partial(create_ignoring_end, client.completions.create)
    return client


def create_ignoring_end(create, *args, **kwargs):
    extra = kwargs.get("extra_body") or {}
    if kwargs.get("max_tokens") and "structured_outputs" not in extra:
        kwargs["extra_body"] = {"ignore_eos": True, **extra}
    return create(*args, **kwargs)


class NoDownloads:
    """Stands in for the hub's client: adapters are not fetched."""

    def snapshot_download(self, *args, **kwargs):
        return "no-adapter"


load_general_plugins()
tests.utils.RemoteOpenAIServer = RunningServer
vllm.transformers_utils.repo_utils.hf_api = NoDownloads

outcomes: dict[str, tuple[str, str]] = {}
refusals: list[str] = []
"""Texts of the 400s that the running test got."""


def keep_refusals(send):
    """A ``requests`` or ``httpx`` client's ``send`` that notes what a 400 says; many tests look at its number only."""

    def note(response):
        if response.status_code == 400:
            refusals.append(response.text)
        return response

    @functools.wraps(send)
    def sending(self, request, *, stream=False, **kwargs):
        response = send(self, request, stream=stream, **kwargs)
        return response if stream else note(response)

    @functools.wraps(send)
    async def sending_async(self, request, *, stream=False, **kwargs):
        response = await send(self, request, stream=stream, **kwargs)
        return response if stream else note(response)

    return sending_async if inspect.iscoroutinefunction(send) else sending


for client_class in (requests.Session, httpx.Client, httpx.AsyncClient):
    client_class.send = keep_refusals(client_class.send)


def pytest_runtest_logstart():
    refusals.clear()


def pytest_runtest_logreport(report):
    """Keep the worst phase's outcome of each test, with its message."""
    if report.when != "call" and report.passed:
        return
    if report.skipped:
        message = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else "expected to fail"
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if report.passed else str(crash.message if crash else report.longrepr)
        if report.failed and refusals:
            message += f" (answered: {refusals[-1]})"
    outcomes[report.nodeid] = (report.outcome, message)


def pytest_collectreport(report):
    """A file that cannot be imported is one failed test."""
    if report.failed:
        outcomes[report.nodeid] = ("failed", str(report.longrepr).strip().splitlines()[-1])


def pytest_sessionfinish():
    RESULT.write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
