"""Check on a vLLM wheel, without installing or importing it, that every private vLLM name this package relies on is still there.

    python tools/check_vllm_names.py vllm-0.33.0-*.whl      # a wheel, or the folder of an unpacked one
    python tools/check_vllm_names.py --download 0.33.0      # fetches that wheel first: several hundred MB
    python tools/check_vllm_names.py --installed            # the vLLM of this environment

Most of what we use of vLLM is private to it and moves without notice, and its GPU wheel cannot be installed where the tests run.
Imports and overridden methods are found by reading our code; what hangs on vLLM's objects is in ``RELIED_ON``. Only names and
parameters are checked: that they still mean the same is for the tests to say. Prints one line per missing name; exits 1 if any.
"""

import argparse
import ast
import functools
import importlib.util
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "vllm_twotower"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")
"""What vLLM's wheels have been tagged with: 0.20.2 is 2_35, older ones 2_31, 0.32 and 0.33 2_28."""

# Our file -> rows "verb module:object names". The verbs:
#   has     the class has these members (attributes set on self included, and those of its bases)
#   starts  its first positional parameters, or fields of the dataclass, have these names in this order
#   takes   it takes parameters of these names
#   reads   its code mentions these names of ours: a hook or an attribute that only helps while vLLM asks for it
RELIED_ON = {
    "__init__.py": """
        has vllm.entrypoints.llm:LLM collective_rpc
        takes vllm.sampling_params:SamplingParams extra_args
    """,
    "registration.py": """
        has vllm.model_executor.models.registry:_ModelRegistry get_supported_archs register_model
        reads vllm.config.vllm:VllmConfig verify_and_update_config
        reads vllm.config.model:ModelConfig verify_and_update_model_config
        has vllm.model_executor.models.config:NemotronHForCausalLMConfig verify_and_update_config
        has vllm.config.vllm:VllmConfig model_config scheduler_config parallel_config cache_config attention_config lora_config
        has vllm.config.vllm:VllmConfig diffusion_config additional_config kv_transfer_config ec_transfer_config
        has vllm.config.vllm:VllmConfig speculative_config watermark_config use_v2_model_runner
        has vllm.config.diffusion:DiffusionConfig canvas_length max_denoising_steps
        has vllm.config.attention:AttentionConfig use_non_causal
        has vllm.config.model:ModelConfig logits_processors max_model_len
        has vllm.config.scheduler:SchedulerConfig scheduler_cls async_scheduling max_num_seqs DEFAULT_MAX_NUM_SEQS policy
        has vllm.config.scheduler:SchedulerConfig max_num_batched_tokens max_num_scheduled_tokens long_prefill_token_threshold
        has vllm.config.parallel:ParallelConfig pipeline_parallel_size tensor_parallel_size data_parallel_size worker_extension_cls
        has vllm.config.parallel:ParallelConfig decode_context_parallel_size prefill_context_parallel_size enable_dbo ubatch_size
        has vllm.config.parallel:ParallelConfig enable_batch_sharded_sampling enable_expert_parallel
        has vllm.config.cache:CacheConfig mamba_cache_mode use_replayssm
        has vllm.platforms.interface:Platform is_cpu
    """,
    "compat.py": """
        has vllm.v1.kv_cache_interface:MambaSpec num_prefill_checkpoint_blocks prefill_checkpoint_alignment
        has vllm.model_executor.layers.mamba.mamba_mixer2:MambaMixer2 get_kv_cache_spec ssm_state_size
        has vllm.model_executor.models.nemotron_h:NemotronHMambaDecoderLayer mixer
        has vllm.v1.outputs:ModelRunnerOutput prompt_logprobs_dict prompt_token_id_logprobs_dict
        reads vllm.model_executor.models.nemotron_h:NemotronHModel ALL_DECODER_LAYER_TYPES
    """,
    "models/twotower.py": """
        reads vllm.v1.worker.gpu.model_states:resolve_model_state_cls get_model_state_cls
        reads vllm.model_executor.model_loader.default_loader:DefaultModelLoader allow_patterns_overrides load_weights
        has vllm.model_executor.models.nemotron_h:NemotronHForCausalLM model config model_config scheduler_config lm_head
        has vllm.model_executor.models.nemotron_h:NemotronHForCausalLM hf_to_vllm_mapper compute_logits load_weights
        has vllm.model_executor.models.nemotron_h:NemotronHModel layers
        has vllm.forward_context:ForwardContext attn_metadata
        takes vllm.model_executor.models.utils:AutoWeightsLoader.load_weights mapper
        has vllm.config.model:ModelConfig dtype
    """,
    "models/weights.py": """
        takes vllm.model_executor.models.utils:WeightsMapper orig_to_new_substr orig_to_new_stacked orig_to_new_prefix
    """,
    "models/portable_moe.py": """
        reads vllm.model_executor.models.nemotron_h:NemotronHForCausalLM n_routed_experts n_logical_experts n_physical_experts
        reads vllm.model_executor.models.nemotron_h:NemotronHForCausalLM n_local_physical_experts n_redundant_experts
        reads vllm.model_executor.models.nemotron_h:NemotronHForCausalLM n_shared_experts
        reads vllm.model_executor.models.nemotron_h:NemotronHMoEDecoderLayer.forward mixer norm
        reads vllm.model_executor.models.utils:AutoWeightsLoader load_weights
        takes vllm.model_executor.models.nemotron_h:NemotronHMLP config hidden_size intermediate_size quant_config reduce_results prefix
    """,
    "models/denoiser_tower.py": """
        has vllm.model_executor.models.nemotron_h:NemotronHAttention q_size kv_size attn
        has vllm.model_executor.layers.mamba.mamba_mixer2:MambaMixer2 kv_cache prefix conv_kernel_size head_dim ssm_state_size
        has vllm.config.vllm:VllmConfig quant_config parallel_config model_config
        has vllm.config.model:ModelConfig hf_config
        starts vllm.model_executor.models.nemotron_h:NemotronHMLP config hidden_size intermediate_size quant_config bias
        takes vllm.model_executor.models.nemotron_h:NemotronHMLP prefix
        starts vllm.model_executor.models.nemotron_h:NemotronHMoE config quant_config parallel_config prefix
        starts vllm.model_executor.layers.linear:QKVParallelLinear hidden_size head_size total_num_heads total_num_kv_heads
        takes vllm.model_executor.layers.linear:QKVParallelLinear bias quant_config prefix
        starts vllm.model_executor.layers.linear:MergedColumnParallelLinear input_size output_sizes
        takes vllm.model_executor.layers.linear:MergedColumnParallelLinear bias quant_config prefix
        starts vllm.model_executor.layers.linear:RowParallelLinear input_size output_size
        takes vllm.model_executor.layers.linear:RowParallelLinear bias quant_config prefix
        starts vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding num_embeddings embedding_dim
        takes vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding quant_config prefix
        starts vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead num_embeddings embedding_dim
        takes vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead quant_config prefix
        starts vllm.model_executor.layers.mamba.mamba_mixer2:Mixer2RMSNormGated full_hidden_size full_n_groups
        takes vllm.model_executor.layers.mamba.mamba_mixer2:Mixer2RMSNormGated eps
        starts vllm.model_executor.layers.mamba.mamba_mixer2:mamba_v2_sharded_weight_loader shard_spec tp_size tp_rank
        starts vllm.model_executor.layers.layernorm:RMSNorm hidden_size eps
        starts vllm.model_executor.layers.logits_processor:LogitsProcessor vocab_size
        starts vllm.model_executor.layers.logits_processor:LogitsProcessor.forward lm_head hidden_states
        starts vllm.model_executor.model_loader.weight_utils:composed_weight_loader loader fn
        starts vllm.model_executor.model_loader.weight_utils:sharded_weight_loader shard_axis
    """,
    "runtime/admission.py": """
        reads vllm.v1.worker.gpu.sample.logits_processor.custom validate_params
    """,
}
