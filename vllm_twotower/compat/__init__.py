"""Shims around vLLM, and nothing else: what has no public hook, or is broken there.

A shim is a function. Its docstring says what it changes and then, each at the start of a line, ``Symptom:`` (what goes
wrong without it), ``Upstream:`` (vLLM's names that it leans on), ``Removed when:`` and ``Test:``.
``docs/compatibility.md`` is made of them, and ``tools/check_vllm_names.py`` checks that a vLLM has those names.

Imports nothing of vLLM before a shim is called, and of ours ``core`` and ``config`` only: what a shim calls of ours is
handed to it. What a shim replaces in vLLM's modules and classes it replaces once, however often it is called; one that
changes an object it is given is called once for each.
"""

from vllm_twotower.compat.engine import (
    add_config_hook,
    choose_default_max_num_seqs,
    explain_failed_import,
    extend_engine_args,
    name_environment_variable,
    replace_tensor_parallel_group,
)
from vllm_twotower.compat.layers import (
    initialize_without_constructor,
    name_layers_as_checkpoint,
    record_kv_updates,
    register_layer,
)
from vllm_twotower.compat.metrics import (
    attach_counts,
    can_report_passes,
    extend_stat_loggers,
    pack_pass_report,
    take_counts,
    take_pass_report,
)
from vllm_twotower.compat.requests import check_requests, decode_beams_in_ar, end_requests_at_shutdown
from vllm_twotower.compat.scheduler import (
    end_with_error,
    find_nan_rows,
    find_prompt_logprobs,
    is_warmup_request,
    keep_largest_cache_estimate,
    passing_over,
    without_caching_blocks,
)
from vllm_twotower.compat.steps import ask_for_logits, drop_attention_plans, follow_mamba_scan, keep_states_of
