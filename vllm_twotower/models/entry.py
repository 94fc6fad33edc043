"""The class that vLLM is told of, and the two that it stands for."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm_twotower.config import EngineOptions
from vllm_twotower.models.twotower import TwoTowerForCausalLM
from vllm_twotower.registration import raise_recorded_problem
from vllm_twotower.runtime.model_state import TwoTowerModelState
from vllm_twotower.split.model import SplitTwoTowerForCausalLM
from vllm_twotower.split.state import SplitModelState


class ColocatedTwoTower(TwoTowerForCausalLM):
    """Both towers on every rank, or with diffusion off the context tower alone."""

    def get_model_state_cls(self) -> type:
        """The runner asks for this class; with diffusion off it gets the one it would have chosen itself."""
        return MambaHybridModelState if self.options is None else TwoTowerModelState


class SplitTwoTower(SplitTwoTowerForCausalLM):
    """One tower of the two."""

    def get_model_state_cls(self) -> type:
        """The runner asks for this class."""
        return SplitModelState


class NemotronHTwoTowerForCausalLM(TwoTowerForCausalLM):
    """Makes the model for the placement that the engine was started with; never has an instance of its own."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """The towers on the same ranks or on different ones.

        Raises:
            RuntimeError: this package could not register with this vLLM.

        """
        raise_recorded_problem()
        options = EngineOptions.read(vllm_config)
        size, hf_config = vllm_config.parallel_config.tensor_parallel_size, vllm_config.model_config.hf_config
        is_split = options is not None and options.is_split(size, hf_config)
        return (SplitTwoTower if is_split else ColocatedTwoTower)(vllm_config=vllm_config, prefix=prefix)
