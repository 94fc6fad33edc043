"""FlashInfer's kernels on the made-up device: its Python as it is, and functions that note their name in the place of
what it would compile or fetch.

The functions that vLLM calls are held against the real ones' signatures at every call. Of the attention that is planned
FlashInfer's wrappers are real, and only the module that they would compile is made up: what arrives at it is on the
host, so it is known, and noted down.
"""

import functools
import importlib
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch

Note = Callable[[str, str], None]
"""Takes the source of a kernel that is launched, and its name."""


def stand_in_for_flashinfer(note: Note) -> None:
    """Put the functions in the place of the kernels; to be called before vLLM's attention backends are imported."""
    _replace(note, "flashinfer.fused_moe", "trtllm_bf16_moe", lambda given: torch.empty_like(given["hidden_states"]))
    _replace(note, "flashinfer.fused_moe", "trtllm_fp4_block_scale_moe", _make_fp4_output)
    _replace(note, "flashinfer", "nvfp4_block_scale_interleave", lambda given: given["unswizzled_sf"].reshape(-1))
    _replace(
        note,
        "flashinfer.prefill",
        "trtllm_batch_context_with_kv_cache",
        lambda given: given["out"],
        lambda given: f"causal={given['causal']}",
    )
    for name in ("trtllm_batch_decode_with_kv_cache", "xqa_batch_decode_with_kv_cache"):
        _replace(note, "flashinfer.decode", name, lambda given: given["out"], _describe_decode)
    import flashinfer.decode
    import flashinfer.prefill

    for module in (flashinfer.prefill, flashinfer.decode):
        module.get_batch_prefill_module = functools.partial(_make_planned_attention, note)


def _replace(
    note: Note,
    module_name: str,
    name: str,
    make_result: Callable[[dict[str, Any]], Any],
    describe: Callable[[dict[str, Any]], str] = lambda _: "",
) -> None:
    """Note a function's calls, and refuse those that the real one would not take."""
    module = importlib.import_module(module_name)
    signature = inspect.signature(getattr(module, name))

    @functools.wraps(getattr(module, name))
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        note("flashinfer", " ".join(filter(None, (name, describe(bound.arguments)))))
        return make_result(bound.arguments)

    setattr(module, name, stand_in)


def _make_fp4_output(given: dict[str, Any]) -> list[torch.Tensor]:
    """In bfloat16, where it was to go, if anywhere."""
    if given["output"] is not None:
        return [given["output"]]
    rows, packed = given["hidden_states"].shape
    return [given["hidden_states"].new_empty(rows, 2 * packed, dtype=torch.bfloat16)]


def _describe_decode(given: dict[str, Any]) -> str:
    """These are causal, or have a mask: tokens a row, which say whether that matters."""
    return f"{given['q_len_per_req']} tokens a row"


def _make_planned_attention(note: Note, backend: str, dtype_q: torch.dtype, *_: Any) -> types.SimpleNamespace:
    """The module that FlashInfer compiles for attention that is planned on the host."""
    if backend == "fa2" and dtype_q.itemsize == 1:  # what FlashInfer says before it compiles
        raise AssertionError("fp8 tensor core is not supported in fa2 backend")

    def plan(*given: Any) -> list[int]:
        # the order in which FlashInfer's wrappers hand them over
        query_starts, page_starts, key_lengths = (x.tolist() for x in given[3:6])
        causal = given[14]
        widths = [end - start for start, end in itertools.pairwise(query_starts)]
        pages = [end - start for start, end in itertools.pairwise(page_starts)]
        said = f"causal={causal}, queries {widths}, keys {key_lengths}, pages {pages} of {given[10]}"
        note("flashinfer", f"plans on the host ({backend}): {said}")
        return [0]

    def paged_run(*given: Any) -> None:
        note("flashinfer", f"paged attention ({backend}) {MASK_MODES[given[12]]}")

    return types.SimpleNamespace(plan=plan, paged_run=paged_run, workspace_size=None)


MASK_MODES = {0: "not causal", 1: "causal"}
"""FlashInfer's numbers of masks."""
