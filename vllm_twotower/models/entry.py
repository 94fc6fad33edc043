"""The class that vLLM is told of."""

from typing import Any

from vllm.config import VllmConfig

from vllm_twotower.config import CONFIG_KEY, EngineOptions
from vllm_twotower.models.twotower import TwoTowerForCausalLM
from vllm_twotower.split.model import SplitTwoTowerForCausalLM


class NemotronHTwoTowerForCausalLM(TwoTowerForCausalLM):
    """Makes the model for the placement that the engine was started with; never has an instance of its own."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """The towers on the same ranks or on different ones."""
        options = EngineOptions.from_additional_config(vllm_config.additional_config.get(CONFIG_KEY))
        size, hf_config = vllm_config.parallel_config.tensor_parallel_size, vllm_config.model_config.hf_config
        if options is not None and options.is_split(size, hf_config):
            return SplitTwoTowerForCausalLM(vllm_config=vllm_config, prefix=prefix)
        return TwoTowerForCausalLM(vllm_config=vllm_config, prefix=prefix)
