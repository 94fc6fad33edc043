"""What crosses between the towers when they are split, and the count of it.

| when | from | to | what |
| --- | --- | --- | --- |
| context step | each context rank | its denoiser rank | the step's keys and values; Mamba states at a prompt's end; \
of later tokens what the Mamba layers were fed |
| context step with AR rows | first context rank | all | their tokens and how many; hints for drafts |
| denoise step | first denoiser rank | all | canvases and pass counts; log-probabilities if asked for |

Both ends derive every shape from the step itself, so nothing but the data is sent: one message per context step.

A Mamba state is large, and what a layer was fed over a canvas is a tenth of it. So a request's states cross once, when
its prompt ends; from then on the denoiser's rank advances its copy over the tokens that the context tower has run.

Legend: T tokens of a step, R rows, U tokens of kept rows, C conv channels, H heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from vllm_twotower import compat
from vllm_twotower.models.mamba import list_mamba_mixers
from vllm_twotower.runtime.step import KeptRows
from vllm_twotower.split.placement import TowerPlacement


@dataclass
class Traffic:
    """What this rank has sent so far."""

    num_bytes: int = 0
    num_messages: int = 0
    num_tokens: int = 0
    """Tokens whose keys and values were sent."""
    num_states: int = 0
    """Rows whose Mamba states were sent."""
    num_kept: int = 0
    """Tokens of which the inputs of Mamba layers were sent."""


class TowerLink:
    """One rank's end of the connection.

    Args:
        placement: of this rank; split.
        layers: the context tower's layers, or their mirror.
        dtype: of the model, hence of keys and values before they are cached.
        device: of the caches.

    """

    def __init__(
        self, placement: TowerPlacement, layers: nn.ModuleList, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.placement = placement
        self.dtype = dtype
        self.device = device
        self.traffic = Traffic()
        mixers: list[Any] = [layer.mixer for layer in layers]
        self._attention = [mixer.attn for mixer in mixers if hasattr(mixer, "attn")]
        self._mamba = list_mamba_mixers(layers)
        self._written: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if placement.has_context:
            for attention in self._attention:
                compat.record_kv_updates(attention, self._keep)

    def _keep(self, layer_name: str, key: torch.Tensor, value: torch.Tensor) -> None:
        self._written[layer_name] = (key, value)

    def hand_over(self, over: "ContextHandover") -> None:
        """On a context rank, after its forward: send what that has just written."""
        parts = []
        for attention in self._attention:
            key, value = self._written.pop(attention.layer_name)
            parts += [key[: over.num_tokens], value[: over.num_tokens]]
        for mixer in self._mamba:
            parts += [cache[over.mamba_slots[mixer.prefix]] for cache in mixer.kv_cache[:2]]
            parts += [part for rows in over.kept_rows for part in rows.kept[mixer.prefix]]
        message = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
        torch.distributed.send(message, self.placement.partner, group=self.placement.group.device_group)
        self._count(message)
        self.traffic.num_tokens += over.num_tokens
        self.traffic.num_states += over.num_states
        self.traffic.num_kept += sum(over.num_kept)

    def take_over(self, over: "ContextHandover") -> None:
        """On a denoiser rank, instead of a forward: receive what ``hand_over`` sends, keys, values and states into the
        mirrored caches, the rest into the step's rows."""
        kv_shapes = [(over.num_tokens, a.num_kv_heads, a.head_size) for a in self._attention for _ in range(2)]
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, self.dtype) for shape in kv_shapes]
        for mixer in self._mamba:
            shapes += [((over.num_states, *cache.shape[1:]), cache.dtype) for cache in mixer.kv_cache[:2]]
            for num_tokens in over.num_kept:
                channels, heads = mixer.conv1d.weight.shape[0], mixer.A.shape[0]
                shapes += [((num_tokens, channels), self.dtype), ((num_tokens, heads), self.dtype)]
        sizes = [torch.Size(shape).numel() * kind.itemsize for shape, kind in shapes]
        message = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        torch.distributed.recv(message, self.placement.partner, group=self.placement.group.device_group)
        # a part need not start at a multiple of its item size: `clone` gives each memory of its own
        parts = [
            part.clone().view(kind).view(shape)
            for part, (shape, kind) in zip(message.split(sizes), shapes, strict=True)
        ]
        slot_mappings = get_forward_context().slot_mapping
        for index, attention in enumerate(self._attention):
            key, value = parts[2 * index : 2 * index + 2]
            slot_T = slot_mappings[attention.layer_name][: over.num_tokens]
            attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slot_T)
        received = iter(parts[len(kv_shapes) :])
        for mixer in self._mamba:
            for cache in mixer.kv_cache[:2]:
                cache[over.mamba_slots[mixer.prefix]] = next(received)
            for rows in over.kept_rows:
                rows.kept[mixer.prefix] = next(received), next(received)

    def share_samples(self, samples: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The first context rank's int64 tensor of this shape, on every rank."""
        return self._share(samples, shape, self.placement.first_context_rank)

    def share_canvases(self, canvases: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The first denoiser rank's int64 tensor of this shape, on every rank."""
        return self._share(canvases, shape, self.placement.first_denoiser_rank)

    def share_object(self, value: Any) -> Any:
        """The first denoiser rank's value, pickled, on every rank; for what is rarely asked for."""
        box = [value]
        torch.distributed.broadcast_object_list(
            box, self.placement.first_denoiser_rank, group=self.placement.group.cpu_group
        )
        return box[0]

    def _share(self, tensor: torch.Tensor | None, shape: tuple[int, ...], source: int) -> torch.Tensor:
        if tensor is None:
            tensor = torch.empty(shape, dtype=torch.int64, device=self.device)
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor, source, group=self.placement.group.device_group)
        if self.placement.group.rank == source:
            self._count(tensor)
        return tensor

    def _count(self, message: torch.Tensor) -> None:
        self.traffic.num_bytes += message.numel() * message.element_size()
        self.traffic.num_messages += 1


@dataclass(frozen=True, kw_only=True)
class ContextHandover:
    """What of one context step crosses."""

    num_tokens: int
    """T, without padding."""
    mamba_slots: Mapping[str, torch.Tensor]
    """Layer name -> int64 [rows], slots of the states that cross whole: of rows whose next step is the first that the
    denoiser runs."""
    kept_rows: Sequence[KeptRows]
    """Rows that the denoiser's rank has the earlier states of."""

    @property
    def num_states(self) -> int:
        """Rows whose states cross whole."""
        return len(next(iter(self.mamba_slots.values()))) if self.mamba_slots else 0

    @property
    def num_kept(self) -> list[int]:
        """U of each of ``kept_rows``."""
        return [len(rows.token_U) for rows in self.kept_rows]
