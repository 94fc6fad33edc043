"""A real ``vllm serve`` process for benchmarks and tests: started, waited for, and stopped again."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import psutil

VLLM = pathlib.Path(sys.executable).with_name("vllm")
START_SECONDS = 400
STOP_SECONDS = 30


@contextlib.contextmanager
def vllm_server(
    model: pathlib.Path | str,
    *options: str,
    log: pathlib.Path,
    cwd: pathlib.Path | None = None,
    start_seconds: float = START_SECONDS,
) -> Iterator[str]:
    """Serve ``model`` on a free port of this machine and yield the server's address.

    Args:
        model: what ``vllm serve`` is given.
        options: its further arguments.
        log: file for the server's output.
        cwd: where the server is started; here by default.
        start_seconds: how long it may take to come up.

    Raises:
        RuntimeError: the server ended while starting or did not come up in time; holds the end of its log.
        subprocess.TimeoutExpired: the server did not stop within half a minute of SIGTERM; it was killed.

    """
    with starting_server(model, *options, log=log, cwd=cwd) as (url, process):
        wait_until_healthy(url, process, log, start_seconds)
        yield url


def find_free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def starting_server(
    model: pathlib.Path | str, *options: str, log: pathlib.Path, cwd: pathlib.Path | None = None
) -> Iterator[tuple[str, subprocess.Popen]]:
    """``vllm_server`` that does not wait for the server to come up: its address to be, and its process."""
    port = find_free_port()
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    command = [str(VLLM), "serve", str(model), "--port", str(port), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=cwd)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        try:
            terminate(process)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()  # an engine outlives a front end that is killed while it loads
            process.kill()
            raise


def terminate(process: subprocess.Popen) -> None:
    """SIGTERM, and a second one if that was lost: while its engine loads vLLM 0.32 swallows one (``test_faults.py``).

    Not more of them: each would interrupt the cleaning up.

    Raises:
        subprocess.TimeoutExpired: the server did not stop within half a minute of the second.

    """
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
        return
    process.send_signal(signal.SIGTERM)
    process.wait(STOP_SECONDS)


def wait_until_healthy(url: str, process: subprocess.Popen, log: pathlib.Path, seconds: float = START_SECONDS) -> None:
    """Return once ``/health`` answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if is_healthy(url):
            return
        time.sleep(0.3)
    raise RuntimeError("the server did not come up:\n" + log.read_text(errors="replace")[-4000:])


def is_healthy(url: str) -> bool:
    """Whether the server says so now."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5)
    except OSError:  # refused, reset, or an error status
        return False
    return True


def read_metrics(url: str) -> str:
    """``/metrics`` as text."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        return answer.read().decode()


def processes_of(log: pathlib.Path) -> list[psutil.Process]:
    """A running server's processes, the front end first, by its log."""
    front_end = psutil.Process(int(re.search(r"\(APIServer pid=(\d+)\)", log.read_text(errors="replace"))[1]))
    return [front_end, *front_end.children(recursive=True)]
