"""A record of canvases filling in, for ``vllm-twotower trace`` and for tests; off unless asked for."""

from collections import defaultdict
from collections.abc import Callable

import torch


class CanvasTrace:
    """Every canvas before every denoise pass, by request, in order; finished canvases are what the request emitted."""

    def __init__(self) -> None:
        self._snapshots: dict[str, list[list[int]]] = defaultdict(list)

    def observer(self, req_ids: list[str], widths: list[int]) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """What a denoise step calls before each pass."""

        def observe(unfinished_R: torch.Tensor, token_RS: torch.Tensor) -> None:
            for row, (req_id, width) in enumerate(zip(req_ids, widths, strict=True)):
                if unfinished_R[row]:
                    self._snapshots[req_id].append(token_RS[row, :width].tolist())

        return observe

    def take(self) -> dict[str, list[list[int]]]:
        """The snapshots of each request id so far; starts over."""
        taken, self._snapshots = dict(self._snapshots), defaultdict(list)
        return taken
