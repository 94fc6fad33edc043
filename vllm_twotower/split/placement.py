"""Which tower this rank holds.

``colocated``: every rank holds its shard of both. ``split``: of a tensor-parallel group of 2N ranks the first N hold
the context tower, the others the denoiser, each sharded N ways by vLLM's own parallel layers, and rank i is paired with
rank N + i. To every layer of a tower the tensor-parallel group *is* its N ranks.
"""

from dataclasses import dataclass
from typing import Any

from vllm.distributed import get_tp_group

from vllm_twotower import compat
from vllm_twotower.config import EngineOptions


@dataclass(frozen=True)
class TowerPlacement:
    """What one rank holds, and the ranks it works with."""

    has_context: bool = True
    has_denoiser: bool = True
    ranks: tuple[int, ...] = ()
    """Global ranks of the context tower, then of the denoiser; empty where the towers are not split."""
    group: Any = None
    """vLLM's ``GroupCoordinator`` of all these ranks; None where the towers are not split."""

    @property
    def is_split(self) -> bool:
        """Whether the towers live on different ranks."""
        return bool(self.ranks)

    @property
    def first_context_rank(self) -> int:
        """Global rank of the context tower's first shard; its output is the engine's."""
        return self.ranks[0]

    @property
    def first_denoiser_rank(self) -> int:
        """Global rank of the denoiser's first shard."""
        return self.ranks[len(self.ranks) // 2]

    @property
    def partner(self) -> int:
        """Global rank of the other tower's shard with the same index."""
        half = len(self.ranks) // 2
        index = self.group.rank_in_group
        return self.ranks[index + half if index < half else index - half]


def take_place(vllm_config: Any, options: EngineOptions | None) -> TowerPlacement:
    """Find this rank's place; to be called before any layer is built.

    With the towers split, vLLM's tensor-parallel group and size become the tower's own from here on, in this process:
    shapes, cache sizes and collectives of its layers all follow from those two.
    """
    if options is None:
        return TowerPlacement(has_denoiser=False)
    size = vllm_config.parallel_config.tensor_parallel_size
    if not options.is_split(size):
        return TowerPlacement()
    group, half = get_tp_group(), size // 2
    compat.replace_tensor_parallel_group([group.ranks[:half], group.ranks[half:]])
    vllm_config.parallel_config.tensor_parallel_size = half
    in_context = group.rank_in_group < half
    return TowerPlacement(in_context, not in_context, tuple(group.ranks), group)
