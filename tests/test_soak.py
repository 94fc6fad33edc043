"""``make soak``, for twenty seconds."""

import random
import shlex

import pytest

from benchmarks import soak
from benchmarks.soak_requests import draw_request
from tests.harness.server import vllm_server


@pytest.mark.slow
def test_twenty_seconds_of_full_load(tmp_path):
    seed = 20  # every kind is among the clients' first requests, and a slow machine gets no further
    first = [draw_request(random.Random(f"{seed}-{i}")).fate for i in range(soak.NUM_CLIENTS)]
    assert {"answered", "left", "refused"} <= set(first)
    with vllm_server(*shlex.split(soak.COMMAND)[2:], log=tmp_path / "log", cwd=soak.ROOT) as url:
        result = soak.soak(url, tmp_path / "log", seconds=20, seed=seed)
    assert result["problems"] == []
    assert result["answered"] > 10
    assert result["left_by_client"] > 0
    assert result["refused"] > 0
    assert result["same_text_alone"] > 10
