"""Answer a data set of questions with Ray Data: each replica is an engine of its own, on any machine of the cluster.

    pip install "ray[data,serve]"
    TRITON_INTERPRET=1 python examples/ray_data.py      # in the repository's root; on a GPU without the variable

vLLM's metrics for Ray import ``ray.serve``.
"""

import pathlib

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

DEMO_MODEL = pathlib.Path("vllm_twotower/assets/demo").resolve()
QUESTIONS = ["Sort: k31 b45 f12", "It is Monday. Move by days: -2 +3 +3 +5 -6 -1 -8"]
SMALL = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}


def ask(row: dict) -> dict:
    """A question as the model was trained on it; ``extra_args`` are those of ``diffusion_params``."""
    settings = {"max_tokens": 96, "temperature": 0.0, "extra_args": {"diffusion_mode": "self_speculation"}}
    return {"prompt": row["item"] + "\nAnswer:", "sampling_params": settings}


def main() -> None:
    config = vLLMEngineProcessorConfig(
        model_source=str(DEMO_MODEL),
        engine_kwargs={"additional_config": {"diffusion": True}, **SMALL},
        # a replica asks for a GPU unless told otherwise, and waits for ever where there is none: leave this out on GPUs
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        batch_size=16,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    answered = build_processor(config, preprocess=ask)(ray.data.from_items(QUESTIONS))
    for row in answered.take_all():
        print(row["prompt"].splitlines()[0], "->", row["generated_text"])


if __name__ == "__main__":
    main()
