"""The fields of ``config.json`` that sizes depend on, read once and checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_twotower.core import MASK_TOKEN_ID

ARCHITECTURE = "NemotronHTwoTowerForCausalLM"

LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}

BYTES_OF_CONFIG_DTYPE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One two-tower model; the names are those of ``config.json``."""

    hybrid_override_pattern: str
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int
    use_conv_bias: bool
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    intermediate_size: int
    max_position_embeddings: int
    dtype: str
    """Of the weights and the KV cache: bfloat16, float16 or float32."""
    mamba_ssm_cache_dtype: str
    """Of the SSM states: the scan runs in float32."""
    mask_token_id: int
    quantization_config: Mapping[str, Any] | None
    """How the checkpoint is quantised, as ``config.json`` says it; None: it is not."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "ModelFacts":
        """Read a two-tower ``config.json``.

        Args:
            config: its content.
            where: the file's name, for messages.

        Raises:
            ValueError: another architecture, or a field that is absent or out of range.

        """
        architectures = config.get("architectures")
        if architectures != [ARCHITECTURE]:
            raise ValueError(
                f'{where}: architectures={architectures} is not a two-tower model: it should be ["{ARCHITECTURE}"]'
            )
        names = [f.name for f in fields(cls)]
        given = {"dtype": config.get("torch_dtype"), **config}
        values = _DEFAULTS | {name: given[name] for name in names if given.get(name) is not None}
        for name in names:
            if name not in values:
                raise ValueError(f"{where} has no {name}: is it the two-tower model's config.json?")
        for name, value, allowed in _find_problems(values, config):
            raise ValueError(f"{where}: {name}={value!r} is not allowed: {allowed}")
        return cls(**values)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number of the weights, activations and KV."""
        return BYTES_OF_CONFIG_DTYPE[self.dtype]

    def layers(self, kind: str) -> int:
        """How many layers of one kind a tower has; ``kind`` is a letter of ``LAYER_KINDS``."""
        return self.hybrid_override_pattern.count(kind)

    @property
    def mamba_channels(self) -> int:
        """Channels of a Mamba layer's convolution: x, B and C."""
        return self.mamba_num_heads * self.mamba_head_dim + 2 * self.n_groups * self.ssm_state_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all attention layers, in the model's dtype."""
        return self.layers("*") * 2 * self.num_key_value_heads * self.head_dim * self.dtype_bytes

    @property
    def conv_bytes_per_layer(self) -> int:
        """The K - 1 newest inputs of one Mamba layer's convolution, in the model's dtype."""
        return self.mamba_channels * (self.conv_kernel - 1) * self.dtype_bytes

    @property
    def ssm_bytes_per_layer(self) -> int:
        """One Mamba layer's SSM state of one request."""
        size = self.mamba_num_heads * self.mamba_head_dim * self.ssm_state_size
        return size * BYTES_OF_CONFIG_DTYPE[self.mamba_ssm_cache_dtype]

    @property
    def mamba_input_bytes_per_token(self) -> int:
        """What the convolutions and step sizes of all Mamba layers are fed for one token, in the model's dtype."""
        return self.layers("M") * (self.mamba_channels + self.mamba_num_heads) * self.dtype_bytes

    @property
    def mamba_bytes_per_request(self) -> int:
        """Conv and SSM states of one request in all Mamba layers."""
        return self.layers("M") * (self.conv_bytes_per_layer + self.ssm_bytes_per_layer)


_DEFAULTS: dict[str, Any] = {
    "n_routed_experts": 0, "num_experts_per_tok": 0, "n_shared_experts": 0, "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0, "intermediate_size": 0, "use_conv_bias": True, "dtype": "bfloat16",
    "mamba_ssm_cache_dtype": "float32", "mask_token_id": MASK_TOKEN_ID, "quantization_config": None,
}  # fmt: skip
"""Fields that a config may leave out or null: its layer kinds do not need them, or (the mask id) the released one has
none."""


_NOT_COUNTED = {
    "hybrid_override_pattern", "dtype", "mamba_ssm_cache_dtype", "use_conv_bias", "quantization_config",
}  # fmt: skip
"""Fields that are no integers."""


_FIXED = {
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "mamba_proj_bias": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
}  # fmt: skip
"""Fields that say what both towers are in any case."""


def _find_problems(values: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Fields that are out of range: name, value and what is allowed. The first is what matters: a later check takes for
    granted what an earlier one has seen."""
    pattern = values["hybrid_override_pattern"]
    if not isinstance(pattern, str) or not pattern or set(pattern) - set(LAYER_KINDS):
        yield "hybrid_override_pattern", pattern, "use M, E, * and - only"
    for name in ("dtype", "mamba_ssm_cache_dtype"):
        if values[name] not in BYTES_OF_CONFIG_DTYPE:
            yield name, values[name], f"use one of {', '.join(BYTES_OF_CONFIG_DTYPE)}"
    if not isinstance(values["quantization_config"], Mapping | None):
        yield "quantization_config", values["quantization_config"], "use an object, or leave it out"
    for name, value in values.items():
        if name in _NOT_COUNTED:
            continue
        low = 0 if name in _DEFAULTS else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            yield name, value, f"use an integer from {low}"
    for whole, part in (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups")):
        if values[whole] % values[part]:
            yield whole, values[whole], f"use a multiple of {part}={values[part]}"
    if values["mask_token_id"] >= values["vocab_size"]:
        yield "mask_token_id", values["mask_token_id"], f"use an id below vocab_size={values['vocab_size']}"
    num_experts, chosen = values["n_routed_experts"], values["num_experts_per_tok"]
    if "E" in pattern and not 0 < chosen <= num_experts:
        yield "num_experts_per_tok", chosen, f"use an integer from 1 to n_routed_experts={num_experts}"
    for name, only in _FIXED.items():
        if config.get(name, only) != only:
            yield name, config[name], f"a two-tower model has {only!r}"
    num_layers = config.get("num_hidden_layers")
    if num_layers is not None and num_layers != len(pattern):
        yield "num_hidden_layers", num_layers, f"hybrid_override_pattern has {len(pattern)}"
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        yield "layer_norm_epsilon", epsilon, "use a number between 0 and 1"
