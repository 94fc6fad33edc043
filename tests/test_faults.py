"""What dies, leaves or is told to stop in the middle of its work: the others get an answer or an error within seconds,
and nothing is left behind. A killed worker of split towers is in ``test_placement.py``."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import time
import urllib.parse

import httpx
import openai
import psutil
import pytest

from tests.demo_questions import LONG
from tests.harness.server import (
    START_SECONDS,
    is_healthy,
    read_metrics,
    starting_server,
    terminate,
    wait_until_healthy,
)
from vllm_twotower.commands.cli import DEMO_MODEL

OPTIONS = ["--diffusion", "--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "512"]
OPTIONS += ["--max-num-seqs", "8", "--enforce-eager"]
SECONDS = 30
"""Within which everything here has to be over; on an idle core it takes up to ten."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its engine is killed by the last test that has it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with starting_server(DEMO_MODEL, *OPTIONS, log=log) as (url, process):
        wait_until_healthy(url, process, log)
        yield url, process, log


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=2 * SECONDS)


def complete(url, **more):
    settings = {"model": "demo", "prompt": LONG, "max_tokens": 20, "temperature": 0.0, **more}
    return client_of(url).completions.create(**settings)


def endless(url):
    """A stream that has begun and would go on to the end of the context."""
    stream = complete(url, max_tokens=450, stream=True, extra_body={"ignore_eos": True})
    assert next(iter(stream)).choices[0].text
    return stream


def within(seconds, condition):
    """Wait for it; how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "not in time"
        time.sleep(0.1)
    return time.monotonic() - started


def gauge(url, name):
    return float(re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", read_metrics(url), re.MULTILINE)[1])


def family_of(process):
    """The server and its children."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def assert_all_gone(family):
    within(SECONDS, lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def leave(url, stream):
    """Send a long request and close the socket once it runs."""
    address = urllib.parse.urlsplit(url)
    request = {"model": "demo", "prompt": LONG, "max_tokens": 450, "stream": stream, "ignore_eos": True}
    body = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((address.hostname, address.port), timeout=SECONDS) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert connection.recv(1000)
        within(SECONDS, lambda: gauge(url, "num_requests_running") > 0)


def test_clients_that_leave_free_what_they_held(server):
    url, *_ = server
    before = complete(url).choices[0].text
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda stream: leave(url, stream), [True, True, True, False]))
    took = within(SECONDS, lambda: gauge(url, "num_requests_running") == 0 and gauge(url, "num_requests_waiting") == 0)
    print(f"clients gone: nothing runs after {took:.1f} s")
    assert gauge(url, "kv_cache_usage_perc") == 0
    assert complete(url).choices[0].text == before


def check_kill(url, process, log, name):
    family = family_of(process)
    stream = endless(url)
    os.kill(int(re.search(rf"\({name}\S* pid=(\d+)\)", log.read_text())[1]), signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)
    told = time.monotonic() - killed
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        complete(url)
    within(SECONDS, lambda: not is_healthy(url))
    unhealthy = time.monotonic() - killed
    process.wait(SECONDS)
    ended = time.monotonic() - killed
    assert_all_gone(family)
    print(f"{name} killed: client told after {told:.1f} s, unhealthy {unhealthy:.1f} s, ended {ended:.1f} s")
    assert ended < SECONDS
    assert re.search(r"died|EngineDeadError", log.read_text())


def test_a_killed_engine_ends_the_server_and_no_client_hangs(server):
    check_kill(*server, "EngineCore")


@pytest.mark.slow
def test_a_killed_worker_ends_the_server_and_no_client_hangs(tmp_path):
    with starting_server(DEMO_MODEL, *OPTIONS, log=tmp_path / "log") as (url, process):
        wait_until_healthy(url, process, tmp_path / "log")
        check_kill(url, process, tmp_path / "log", "Worker")


def stop(process, once=True):
    """SIGTERM; how long the server and its children took to end."""
    family, started = family_of(process), time.monotonic()
    if once:
        process.send_signal(signal.SIGTERM)
        process.wait(SECONDS)
    else:
        terminate(process)
    assert_all_gone(family)
    return time.monotonic() - started


def test_sigterm_while_generating_ends_what_runs_and_what_waits(tmp_path):
    """Most of it with an error, as aborted what the engine had the time to say so of."""
    with starting_server(DEMO_MODEL, *OPTIONS, "--max-num-seqs", "2", log=tmp_path / "log") as (url, process):
        wait_until_healthy(url, process, tmp_path / "log")
        streams = [endless(url), endless(url)]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(complete, url, max_tokens=450, extra_body={"ignore_eos": True}) for _ in range(2)]
            within(SECONDS, lambda: gauge(url, "num_requests_waiting") == 2)
            print(f"SIGTERM while generating: over after {stop(process):.1f} s")
            for stream in streams:
                assert_told(lambda stream=stream: list(stream)[-1])
            for answer in waiting:
                assert_told(answer.result)


def assert_told(last):
    """The request was aborted, or ended with an error."""
    with contextlib.suppress(openai.APIError, httpx.HTTPError):
        assert last().choices[0].finish_reason == "abort"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "once"), [("Loading weights took", False), ("Available routes are", True)])
def test_sigterm_while_starting(tmp_path, stage, once):
    log = tmp_path / "log"
    with starting_server(DEMO_MODEL, *OPTIONS, log=log) as (_, process):
        within(START_SECONDS, lambda: stage in log.read_text())
        print(f"SIGTERM at {stage!r}: over after {stop(process, once):.1f} s")


def test_vllm_still_swallows_a_sigterm_while_its_engine_loads():
    """Its handler raises ``KeyboardInterrupt``, in ``wait_for_engine_startup``, which is inside of this."""
    import zmq
    from vllm.utils.network_utils import get_open_zmq_ipc_path, zmq_socket_ctx

    with zmq_socket_ctx(get_open_zmq_ipc_path(), zmq.ROUTER, bind=True):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_two_servers_on_one_host_and_sigterm_with_patience(tmp_path):
    """With ``--shutdown-timeout`` what runs is finished first; the other server does not notice."""
    logs = [tmp_path / "one", tmp_path / "two"]
    long = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
    with (
        starting_server(DEMO_MODEL, *OPTIONS, log=logs[0]) as (url, process),
        starting_server(DEMO_MODEL, *OPTIONS, "--shutdown-timeout", "300", log=logs[1]) as (patient_url, patient),
    ):
        wait_until_healthy(url, process, logs[0])
        wait_until_healthy(patient_url, patient, logs[1])
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            texts = [a.choices[0].text for a in pool.map(lambda at: complete(at, **long), [url, patient_url])]
        assert texts[0] == texts[1]
        stream = complete(patient_url, **long, stream=True)
        begun = next(iter(stream)).choices[0].text
        family = family_of(patient)
        patient.send_signal(signal.SIGTERM)
        assert begun + "".join(chunk.choices[0].text for chunk in stream) == texts[0]
        patient.wait(SECONDS)
        assert_all_gone(family)
        assert complete(url, **long).choices[0].text == texts[0]
