"""The page of ``vllm-twotower trace``: one self-contained HTML file that plays a request's canvases denoising."""

import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_twotower.commands.live import Recording

TEMPLATE = pathlib.Path(__file__).parents[1] / "assets" / "trace.html"
PLACEHOLDER = "/*TRACE*/"


def render_page(recording: "Recording", decode: Callable[[int], str], title: str, about: str, threshold: float) -> str:
    """The page as HTML.

    Args:
        recording: the request, decoded by mask diffusion.
        decode: token id -> text.
        title: heading of the page.
        about: a line below it.
        threshold: the request's confidence threshold; reveals at or below it are marked.

    Raises:
        ValueError: the request has no denoise passes.

    """
    if not recording.passes:
        raise ValueError(
            "the request ran no denoise pass: a page shows mask diffusion, so leave mode at mask_diffusion"
        )
    document = {
        "title": title,
        "about": about,
        "prompt": recording.prompt,
        "threshold": threshold,
        "canvases": canvases_of(recording, decode),
    }
    # inside a script element only `<` could end the data
    data = json.dumps(document, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, data)


def canvases_of(recording: "Recording", decode: Callable[[int], str]) -> list[dict[str, Any]]:
    """The recording canvas by canvas, token ids replaced by text.

    Returns:
        For each canvas ``cells``, one per position with ``text``, the ``pass`` that revealed it (from 1), its
        ``confidence``, and ``kept`` (False past the end of the request); and ``passes``, for each pass a dict
        position -> [text, probability] pairs of what was still masked, the proposal first.

    """
    canvases: list[list[dict[str, Any]]] = []
    for record in recording.passes:
        if len(record["proposals"]) == len(record["tokens"]):  # a canvas starts with everything masked
            canvases.append([])
        canvases[-1].append(record)
    shown, num_left = [], len(recording.token_ids)
    for passes in canvases:
        cells = _cells(passes, decode)
        for position, cell in enumerate(cells):
            cell["kept"] = position < num_left
        num_left -= len(cells)
        shown.append({"cells": cells, "passes": [_candidates(record["proposals"], decode) for record in passes]})
    return shown


def _cells(passes: list[dict[str, Any]], decode: Callable[[int], str]) -> list[dict[str, Any]]:
    """Each position's outcome: it was revealed by the last pass that still proposed something for it."""
    cells: list[dict[str, Any]] = [{} for _ in passes[0]["tokens"]]
    for index, record in enumerate(passes):
        for position, proposal in record["proposals"].items():
            cells[position] = {
                "text": decode(proposal["token"]),
                "pass": index + 1,
                "confidence": round(proposal["confidence"], 4),
            }
    return cells


def _candidates(proposals: dict[int, dict[str, Any]], decode: Callable[[int], str]) -> dict[int, list[list[Any]]]:
    shown = {}
    for position, proposal in proposals.items():
        others = [pair for pair in proposal["candidates"] if pair[0] != proposal["token"]]
        ordered = [(proposal["token"], proposal["confidence"]), *others]
        shown[position] = [[decode(token), round(probability, 4)] for token, probability in ordered]
    return shown
