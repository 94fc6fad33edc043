"""``make soak``, for twenty seconds."""

import shlex

import pytest
import soak
from server import vllm_server


@pytest.mark.slow
def test_twenty_seconds_of_full_load(tmp_path):
    with vllm_server(*shlex.split(soak.COMMAND)[2:], log=tmp_path / "log", cwd=soak.ROOT) as url:
        result = soak.soak(url, tmp_path / "log", seconds=20, seed=1)
    assert result["problems"] == []
    assert result["answered"] > 10
    assert result["left_by_client"] > 0
    assert result["refused"] > 0
    assert result["same_text_alone"] > 10
