"""Canvases in the flat token dimension and back."""

import pytest
import torch

from vllm_twotower.runtime.step import CanvasLayout


@pytest.mark.parametrize("widths", [[4, 4, 4], [4, 1, 3], [2], [1, 1]])
def test_tokens_come_back_from_where_they_were_put(widths):
    layout = CanvasLayout.from_widths(widths, torch.device("cpu"))
    assert layout.row_T.tolist() == [row for row, width in enumerate(widths) for _ in range(width)]
    assert layout.column_T.tolist() == [column for width in widths for column in range(width)]
    x_TC = torch.randn(sum(widths), 5)
    x_RSC = layout.pad(x_TC)
    assert x_RSC.shape == (len(widths), max(widths), 5)
    assert x_RSC[layout.row_T, layout.column_T].equal(x_TC)
    assert layout.unpad(x_RSC).equal(x_TC)


def test_canvases_of_one_width_are_not_moved():
    layout = CanvasLayout.from_widths([4, 4], torch.device("cpu"))
    x_TC = torch.randn(8, 5)
    assert layout.unpad(layout.pad(x_TC)).data_ptr() == x_TC.data_ptr()
