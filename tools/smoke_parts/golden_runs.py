"""The golden cases of NVIDIA's own code through the engine: equality in fp32, agreement of tokens otherwise."""

from typing import Any

from tests.harness.engine import count_denoise_graphs, list_backends, start_llm
from tests.harness.goldens import Golden, golden_params

CANVAS_LENGTH = 16


def run(args: Any, dtype: str, backend: str, eager: bool = True) -> dict[str, Any]:
    """Both golden checkpoints; ``args.cases`` limits the cases of each."""
    names = ("tiny-mlp", "tiny-moe")[: args.checkpoints]
    return {name: compare_golden(Golden(name), args, dtype, backend, eager) for name in names}


def compare_golden(golden: Golden, args: Any, dtype: str, backend: str, eager: bool) -> dict[str, Any]:
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_twotower import diffusion_stats

    cases = golden.cases(CANVAS_LENGTH)[: args.cases]
    settings = {"dtype": dtype, "max_model_len": 512, "max_num_seqs": 64, "enforce_eager": eager}
    settings |= {"kv_cache_memory_bytes": 128 << 20, "attention_backend": AttentionBackendEnum[backend]}
    # on a GPU only a step of several passes shows that nothing has to be read between them
    diffusion = {"canvas_length": CANVAS_LENGTH, "passes_per_step": 1 if eager else 3}
    with start_llm(golden.path, additional_config={"diffusion": diffusion}, **settings) as llm:
        chosen = list_backends(llm)
        requests = [golden_params(c) for c in cases]
        outputs = llm.generate([{"prompt_token_ids": c["prompt"]} for c in cases], requests, use_tqdm=False)
        passes = diffusion_stats(llm)["denoise_passes"]
        graphs = count_denoise_graphs(llm)
    written = [list(o.outputs[0].token_ids) for o in outputs]
    return {
        "dtype": dtype,
        "attention_backends": chosen,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "denoise_graphs": graphs,
        "denoise_passes": passes,
        "denoise_passes_of_reference": sum(c["nfe"] for c in cases),
        **compare([c["output"] for c in cases], written),
    }


def compare(expected: list[list[int]], written: list[list[int]]) -> dict[str, Any]:
    """How much of what was expected was written; a first token that differs makes the rest of its text differ too."""
    pairs = list(zip(expected, written, strict=True))
    same = [[a == b for a, b in zip(e, w, strict=True)] for e, w in pairs]
    return {
        "cases": len(pairs),
        "equal_cases": sum(map(all, same)),
        "tokens": sum(map(len, same)),
        "equal_tokens": sum(map(sum, same)),
        "mean_equal_prefix": sum([*case, False].index(False) for case in same) / len(same),
        "cases_that_differ": [index for index, case in enumerate(same) if not all(case)],
    }
