"""Runs golden cases, or held-out questions of the demo model in two modes, on two or more worker processes and prints
what came out as a line of JSON; see ``test_placement.py``.

python -m tests.two_ranks NAME_OF_GOLDEN '{"diffusion": {...}, "cases": {"mask_diffusion": [0, 1]}, "engine": {...}}'
python -m tests.two_ranks demo '{"diffusion": {...}, "questions_per_family": 1, "temperature": 0.7, "engine": {...}}'
"""

import itertools
import json
import os
import sys

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `apply_model` sends a function

import tests.conftest  # noqa: F401 - sets the environment
from benchmarks.quality_parts.questions import held_out
from tests.harness.engine import count_tensors, start_llm
from tests.harness.goldens import Golden, golden_params


def weight_bytes(model) -> int:
    """Parameters, and the linears that vLLM has packed into a form of its own on a CPU, their parameter then empty."""
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    packed = [m for m in model.modules() if hasattr(m, "output_size_per_partition") and m.weight.numel() == 0]
    return held + sum(m.input_size_per_partition * m.output_size_per_partition * 4 for m in packed)


def count_heads(worker) -> int:
    """Attention heads of a rank, as vLLM's attention backends compute them."""
    config = worker.vllm_config
    return config.model_config.get_num_attention_heads(config.parallel_config)


def count_after(llm, prompts, params):
    """Tensors that each worker holds when it has answered these requests once more."""
    llm.reset_prefix_cache()
    llm.generate(prompts, params, use_tqdm=False)
    return llm.collective_rpc(count_tensors)


def requests_of(golden, cases):
    from vllm_twotower import diffusion_params

    prompts, params = [], []
    for mode, indices in cases.items():
        for index in indices:
            case = getattr(golden, "ar" if mode == "self_speculation" else mode)[index]
            if mode == "mask_diffusion":
                one = golden_params(case, logprobs=1)
            else:
                length = len(case["output"])
                one = diffusion_params(mode=mode, temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
            prompts.append({"prompt_token_ids": case["prompt"]})
            params.append(one)
    return prompts, params


def give_cores(num_ranks: int) -> None:
    """Each worker a core, in turn; vLLM alone wants a NUMA node for each."""
    cores = itertools.cycle(os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "0|1").split("|"))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(itertools.islice(cores, num_ranks))


def run_questions(job, settings):
    """Questions answered by AR and by self-speculation on one engine, perhaps after a start with other weights."""
    from vllm_twotower import diffusion_params, diffusion_stats
    from vllm_twotower.commands.cli import DEMO_MODEL

    def params(mode, seed):
        return diffusion_params(mode=mode, temperature=job["temperature"], seed=seed, max_tokens=64)

    model = job.get("start_with", str(DEMO_MODEL))
    with start_llm(model, **{**settings, "skip_tokenizer_init": False}) as llm:
        if model != str(DEMO_MODEL):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(DEMO_MODEL)})
        items = held_out(job["questions_per_family"])
        prompts, answers, num_right = [item.prompt for item in items], {}, 0
        for mode in ("ar", "self_speculation"):
            diffusion_stats(llm, reset=True)
            asked = [params(mode, seed) for seed in range(len(prompts))]
            outputs = [o.outputs[0] for o in llm.generate(prompts, asked, use_tqdm=False)]
            answers[mode] = [list(o.token_ids) for o in outputs]
            num_right += sum(o.text == item.answer for o, item in zip(outputs, items, strict=True))
        return {
            "answers": answers,
            "num_right": num_right,
            "stats": diffusion_stats(llm),
            "traffic": llm.collective_rpc("diffusion_traffic"),
        }


def main() -> None:
    from tests.two_ranks import count_heads, weight_bytes  # what is sent to the workers must not be `__main__`'s
    from vllm_twotower import diffusion_stats

    job = json.loads(sys.argv[2])
    small = {"max_model_len": 512, "max_num_seqs": 64, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    settings = {"tensor_parallel_size": 2} | small | job["engine"]
    settings |= {
        "dtype": "float32",
        "disable_log_stats": False,
        "additional_config": {"diffusion": {"draft_policy": "always", **job["diffusion"]}},
    }
    give_cores(settings["tensor_parallel_size"])
    if sys.argv[1] == "demo":
        print("RESULT " + json.dumps(run_questions(job, settings)))
        return
    golden = Golden(sys.argv[1])
    prompts, params = requests_of(golden, job["cases"])
    with start_llm(golden.path, **settings) as llm:
        answers = llm.generate(prompts, params, use_tqdm=False)
        outputs = [o.outputs[0] for o in answers]
        result = {
            "tokens": [list(o.token_ids) for o in outputs],
            "num_logprobs": [len(o.logprobs or ()) for o in outputs],
            "num_prompt_tokens": sum(len(o.prompt_token_ids) - (o.num_cached_tokens or 0) for o in answers),
            "num_preemptions": next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
            "stats": diffusion_stats(llm),
            "traffic": llm.collective_rpc("diffusion_traffic"),
            "weight_bytes": llm.apply_model(weight_bytes),
            "num_heads": llm.collective_rpc(count_heads),
        }
        result["num_tensors"] = [count_after(llm, prompts, params) for _ in range(job.get("rounds", 0))]
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
