"""Verifying drafts in a context step: the context tower runs over a known token and the drafts behind it, and its
Mamba states end where the accepted drafts do.

vLLM's Mamba layers would advance a row's states over all its tokens, the wrong drafts too. So they do not see these
rows, or where prompts are among them are given the null block to read and write for them, and the rows' outputs are
computed from their real states, which stay as they are (``ops.seeded_conv``, ``ops.seeded_scan``, as in a denoise
pass). What the layers were fed is kept, and when the sampler has said how many tokens count, the states are replayed
over exactly those.

Legend: F rows that verify, U their tokens in batch order, S widest, C conv channels, H heads, P head dim.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionMetadata
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_twotower import compat
from vllm_twotower.models.mamba import convolve, find_state_caches, list_mamba_mixers
from vllm_twotower.ops import ScanInputs, seeded_scan, state_replay
from vllm_twotower.runtime.host_copies import copy_together
from vllm_twotower.runtime.step import KeptRows, Step, VerifyRows


@dataclasses.dataclass
class KeepingMetadata(Mamba2AttentionMetadata):
    """vLLM's metadata of a Mamba layer, and the rows of which it has to keep its inputs."""

    kept: Sequence[KeptRows] = ()
    verify: VerifyRows | None = None
    """Those among them that it must not advance."""


def ask_for_logits(batch: InputBatch, step: Step, rows: list[int]) -> None:
    """Let the batch ask for logits at every token of some rows, and at the last token of the others, as before."""
    num_logits = np.ones(batch.num_reqs, dtype=np.int32)
    num_logits[rows] = [step.widths[row] for row in rows]
    compat.ask_for_logits(batch, num_logits, copy_together)


def mark_kept_rows(step: Step, metadata: dict[str, Any]) -> dict[str, Any]:
    """The step's metadata, by layer name; that of Mamba layers names the rows whose inputs are kept, and leaves the
    states of verifying rows alone."""
    if not step.kept:
        return metadata
    made: dict[int, KeepingMetadata] = {}
    result = {}
    for name, one in metadata.items():
        if isinstance(one, Mamba2AttentionMetadata):
            if id(one) not in made:
                made[id(one)] = _make_metadata(step, one)
            one = made[id(one)]
        result[name] = one
    return result


def _make_metadata(step: Step, metadata: Mamba2AttentionMetadata) -> KeepingMetadata:
    if step.verify is not None:
        metadata = compat.keep_states_of(metadata, step.verify.row_F)
    fields = {f.name: getattr(metadata, f.name) for f in dataclasses.fields(metadata)}
    return KeepingMetadata(**fields, kept=step.kept, verify=step.verify)


def keep_layer_inputs(mixer: MambaMixer2) -> None:
    """Let a context Mamba layer keep its inputs where its metadata says so, and compute verifying rows from states that
    it leaves alone."""

    def keep(projected_states: torch.Tensor, output: torch.Tensor) -> None:
        metadata = get_forward_context().attn_metadata
        mine = metadata.get(mixer.prefix) if isinstance(metadata, dict) else None
        if not isinstance(mine, KeepingMetadata):
            return
        sizes = [mixer.tped_intermediate_size, mixer.tped_conv_size, mixer.tped_dt_size]
        for rows in mine.kept:
            _, xbc_UC, dt_UH = projected_states[rows.token_U].split(sizes, dim=-1)
            rows.kept[mixer.prefix] = xbc_UC, dt_UH
        if mine.verify is not None:
            y_FSHP = seeded_scan(_read_inputs(mixer, mine.verify)[0], out_dtype=output.dtype)
            output[mine.verify.token_U] = mine.verify.layout.unpad(y_FSHP.flatten(2))

    compat.follow_mamba_scan(mixer, keep)


def _read_inputs(mixer: MambaMixer2, rows: KeptRows) -> tuple[ScanInputs, torch.Tensor]:
    """What the layer's scan read of some rows, and the convolution before it, [F, S, C]."""
    raw_FSC, dt_FSH = map(rows.layout.pad, rows.kept[mixer.prefix])
    return convolve(mixer, raw_FSC, dt_FSH, find_state_caches(mixer), rows.layout.mamba_slots[mixer.prefix]), raw_FSC


def replay_states(layers: nn.ModuleList, rows: KeptRows, num_tokens_F: torch.Tensor) -> None:
    """Advance the states of some rows over their first tokens, in place; nothing is read by the host.

    Args:
        layers: the context tower's, or those that mirror their caches.
        rows: with what the forward has kept.
        num_tokens_F: int64 [F], tokens that count; of a verifying row the known one and the accepted drafts.

    """
    for mixer in list_mamba_mixers(layers):
        inputs, raw_FSC = _read_inputs(mixer, rows)
        state_replay(inputs, raw_RSC=raw_FSC, conv_cache_ZKC=find_state_caches(mixer)[0], num_tokens_R=num_tokens_F)
