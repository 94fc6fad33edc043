"""What crosses between the towers when they are split, and the count of it.

| when | from | to | what |
| --- | --- | --- | --- |
| context step | each context rank | its denoiser rank | the step's keys and values; states of rows to denoise |
| context step with AR rows | first context rank | all | their tokens and how many |
| denoise step | first denoiser rank | all | canvases and pass counts; log-probabilities if asked for |

Both ends derive every shape from the step itself, so nothing but the data is sent: one message per context step.

Legend: T tokens of a step, R rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from vllm_twotower import compat
from vllm_twotower.models.mamba import mamba_mixers
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
        self._mamba = mamba_mixers(layers)
        self._written: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if placement.has_context:
            for attention in self._attention:
                compat.record_kv_updates(attention, self._keep)

    def _keep(self, layer_name: str, key: torch.Tensor, value: torch.Tensor) -> None:
        self._written[layer_name] = (key, value)

    def hand_over(self, num_tokens: int, mamba_slots: Mapping[str, torch.Tensor]) -> None:
        """Context rank: send what a context forward has just written.

        Args:
            num_tokens: T of the step, without padding.
            mamba_slots: layer name -> int64 [R], slots of the states that the next denoise steps start from.

        """
        parts = []
        for attention in self._attention:
            key, value = self._written.pop(attention.layer_name)
            parts += [key[:num_tokens], value[:num_tokens]]
        for mixer in self._mamba:
            parts += [cache[mamba_slots[mixer.prefix]] for cache in mixer.kv_cache[:2]]
        message = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
        torch.distributed.send(message, self.placement.partner, group=self.placement.group.device_group)
        self._count(message)
        self.traffic.num_tokens += num_tokens
        self.traffic.num_states += self._num_rows(mamba_slots)

    def take_over(self, num_tokens: int, mamba_slots: Mapping[str, torch.Tensor]) -> None:
        """Denoiser rank: receive what ``hand_over`` sends and write it into the mirrored caches."""
        num_rows = self._num_rows(mamba_slots)
        kv_shapes = [(num_tokens, a.num_kv_heads, a.head_size) for a in self._attention for _ in range(2)]
        states = [cache for mixer in self._mamba for cache in mixer.kv_cache[:2]]
        shapes = [(shape, self.dtype) for shape in kv_shapes] + [((num_rows, *c.shape[1:]), c.dtype) for c in states]
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
            slot_T = slot_mappings[attention.layer_name][:num_tokens]
            attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slot_T)
        received = iter(parts[len(kv_shapes) :])
        for mixer in self._mamba:
            for cache in mixer.kv_cache[:2]:
                cache[mamba_slots[mixer.prefix]] = next(received)

    def share_samples(self, samples: torch.Tensor | None, num_rows: int) -> torch.Tensor:
        """The first context rank's int64 [R, 2], token and number of tokens of each row, on every rank."""
        return self._share(samples, (num_rows, 2), self.placement.first_context_rank)

    def share_canvases(self, canvases: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
        """The first denoiser rank's int64 tensor of this shape, on every rank."""
        return self._share(canvases, shape, self.placement.first_denoiser_rank)

    def share_object(self, value: Any) -> Any:
        """The first denoiser rank's value, pickled, on every rank; for what is rarely asked for."""
        box = [value]
        torch.distributed.broadcast_object_list(
            box, self.placement.first_denoiser_rank, group=self.placement.group.cpu_group
        )
        return box[0]

    def _share(self, tensor: torch.Tensor | None, shape: tuple[int, int], source: int) -> torch.Tensor:
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

    def _num_rows(self, mamba_slots: Mapping[str, torch.Tensor]) -> int:
        return len(next(iter(mamba_slots.values()))) if mamba_slots else 0


@dataclass(frozen=True, kw_only=True)
class ContextHandover:
    """What of one context step crosses, passed to the model as an input of the step."""

    link: TowerLink
    num_tokens: int
    """T, without padding."""
    mamba_slots: Mapping[str, torch.Tensor]
    """Layer name -> int64 [R], slots of the states that the next denoise steps start from."""

    def send(self) -> None:
        """On the context tower's rank, after its forward."""
        self.link.hand_over(self.num_tokens, self.mamba_slots)

    def receive(self) -> None:
        """On the denoiser's rank, instead of a forward."""
        self.link.take_over(self.num_tokens, self.mamba_slots)
