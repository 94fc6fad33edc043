"""Everything that decides what is trained, in one place."""

from dataclasses import dataclass, field
from typing import Any

CANVAS = 16

MODEL: dict[str, Any] = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "vocab_size": 1536,
    "hidden_size": 192,
    "hybrid_override_pattern": "M*EM*EM*EM*E",
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "conv_kernel": 4,
    "chunk_size": 128,
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mamba_ssm_cache_dtype": "float32",
    "time_step_limit": [0.0, 1e30],
}


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One training phase: Muon for the matrices inside layers, AdamW for everything else."""

    steps: int
    matrix_lr: float
    other_lr: float
    warmup_steps: int = 40
    decay_fraction: float = 0.4
    """The last part of the steps, over which the learning rates fall linearly to nothing."""
    weight_decay: float = 0.02
    balance_rate: float = 1e-3
    """How far a router's correction bias moves per step towards experts chosen too rarely."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The run."""

    seed: int = 0
    tokens_per_batch: int = 4096
    """Tokens of a batch, padding included."""
    text_share: float = 0.05
    """Share of a batch's tokens, before padding, that are prose and code; the rest are tasks."""
    text_length: int = 112
    family_weights: dict[str, float] = field(
        default_factory=lambda: {"list_code": 1.5, "reverse": 1.3, "units": 1.2, "repeat": 0.3}
    )
    """How often a task family comes relative to the others; 1 where it is not named."""
    context: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(steps=3800, decay_fraction=0.42, matrix_lr=0.008, other_lr=2e-3)
    )
    denoiser: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(steps=14000, decay_fraction=0.71, matrix_lr=0.008, other_lr=2e-3)
    )
