"""The page of ``vllm-twotower trace``: one self-contained HTML file that plays a request's canvases denoising,
or its drafts and what the context tower made of them."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_twotower.commands.live import Recording

TEMPLATE = pathlib.Path(__file__).parents[1] / "assets" / "trace.html"
PLACEHOLDER = "/*TRACE*/"


def render_page(recording: "Recording", decode: Callable[[int], str], title: str, about: str, threshold: float) -> str:
    """The page as HTML.

    Args:
        recording: the request, decoded by mask diffusion or self-speculation.
        decode: token id -> text.
        title: heading of the page.
        about: a line below it.
        threshold: the request's confidence threshold; reveals at or below it are marked.

    Raises:
        ValueError: the request has no denoise passes.

    """
    if all("drafts" in record for record in recording.records):
        raise ValueError(
            "the request ran no denoise pass: a page shows mask diffusion, so leave mode at mask_diffusion; a page of "
            "self_speculation needs an answer of more than one token"
        )
    document = {
        "title": title,
        "about": about,
        "prompt": recording.prompt,
        "threshold": threshold,
        "canvases": list_canvases(recording, decode),
    }
    # inside a script element only `<` could end the data
    data = json.dumps(document, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, data)


def list_canvases(recording: "Recording", decode: Callable[[int], str]) -> list[dict[str, Any]]:
    """The recording canvas by canvas, or context step by context step, token ids replaced by text.

    Returns:
        For each canvas ``cells``, one per position with ``text``, the ``pass`` that revealed it (from 1), its
        ``confidence``, and ``kept`` (False past the end of the request); and ``passes``, for each pass a dict
        position -> [text, probability] pairs of what was still masked, the proposal first.

        In self-speculation a canvas is a draft and has ``verified`` too: ``accepted``, how many drafts were kept;
        ``next``, the text of the context tower's own token, and ``kept``, of that token. Its first cell is the known
        token; that and what a hint gave have ``pass`` 0 and no confidence. A context step that verified no draft has
        no cells and no passes.

    """
    shown: list[dict[str, Any]] = []
    num_left, last_token = len(recording.token_ids), -1
    for passes, verified in _group_passes(recording.records):
        if verified is None:
            cells = _list_cells(passes, passes[0]["tokens"], decode)
            kept = len(cells)
        else:
            cells = _list_cells(passes, [last_token, *verified["drafts"]], decode) if verified["drafts"] else []
            kept, last_token = verified["num_accepted"], verified["next_token"]
        first = 0 if verified is None else 1  # the known token counts where it was written
        for position, cell in enumerate(cells):
            cell["kept"] = first <= position < first + min(kept, num_left)
        num_left = max(0, num_left - kept)
        canvas: dict[str, Any] = {"cells": cells, "passes": [_list_candidates(p["proposals"], decode) for p in passes]}
        if verified is not None:
            canvas["verified"] = {"accepted": kept, "next": decode(last_token), "kept": num_left > 0}
            num_left = max(0, num_left - 1)
        shown.append(canvas)
    return shown


def _group_passes(records: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], dict[str, Any] | None]]:
    """Passes of each canvas, and the context step that verified it or had none to verify; a draft that a preemption
    dropped is left out."""
    canvases: list[tuple[list[dict[str, Any]], dict[str, Any] | None]] = []
    passes: list[dict[str, Any]] = []
    for record in records:
        if "drafts" in record:
            canvases.append((passes if record["drafts"] else [], record))
            passes = []
            continue
        num_masked = len(record["proposals"])
        # a canvas of mask diffusion starts with everything masked, and every pass decides something
        if passes and (num_masked == len(record["tokens"]) or num_masked >= len(passes[-1]["proposals"])):
            canvases.append((passes, None))
            passes = []
        passes.append(record)
    if passes:
        canvases.append((passes, None))
    speculates = any(verified is not None for _, verified in canvases)
    return [(own, verified) for own, verified in canvases if verified is not None or not speculates]


def _list_cells(
    passes: list[dict[str, Any]], tokens: Sequence[int], decode: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Each position's outcome: it was revealed by the last pass that still proposed something for it, and where none
    did, the token was there before."""
    cells = [{"text": decode(token), "pass": 0, "confidence": None} for token in tokens]
    for index, record in enumerate(passes):
        for position, proposal in record["proposals"].items():
            cells[position] = {
                "text": decode(proposal["token"]),
                "pass": index + 1,
                "confidence": round(proposal["confidence"], 4),
            }
    return cells


def _list_candidates(proposals: dict[int, dict[str, Any]], decode: Callable[[int], str]) -> dict[int, list[list[Any]]]:
    shown = {}
    for position, proposal in proposals.items():
        others = [pair for pair in proposal["candidates"] if pair[0] != proposal["token"]]
        ordered = [(proposal["token"], proposal["confidence"]), *others]
        shown[position] = [[decode(token), round(probability, 4)] for token, probability in ordered]
    return shown
