"""Which tower this rank holds.

Of a tensor-parallel group of 2N ranks the first N hold the context tower, the others the denoiser, each sharded N ways
by vLLM's own parallel layers, and rank i is paired with rank N + i. To every layer of a tower the tensor-parallel group
*is* its N ranks.
"""

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_twotower import compat


@dataclass(frozen=True, kw_only=True)
class TowerPlacement:
    """What one rank holds, and the ranks it works with."""

    has_context: bool
    """Whether it holds the context tower, or the denoiser."""
    ranks: tuple[int, ...]
    """Global ranks of the context tower, then of the denoiser."""
    group: GroupCoordinator
    """vLLM's group of all these ranks."""

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


def resolve_placement(vllm_config: VllmConfig) -> TowerPlacement:
    """Find this rank's place and narrow its tensor-parallel group to its tower's; to be called before any layer is
    built.

    vLLM's tensor-parallel group and size are the tower's own from here on, in this process: shapes, cache sizes and
    collectives of its layers all follow from those two.
    """
    group, half = get_tp_group(), vllm_config.parallel_config.tensor_parallel_size // 2
    compat.replace_tensor_parallel_group(vllm_config.parallel_config, [group.ranks[:half], group.ranks[half:]])
    in_context = group.rank_in_group < half
    return TowerPlacement(has_context=in_context, ranks=tuple(group.ranks), group=group)
