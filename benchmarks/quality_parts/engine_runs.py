"""The questions through the real vLLM engine, in this process."""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from benchmarks.quality_parts.questions import MAX_TOKENS, Item, Outcome, shares
from tests.harness.engine import start_llm

if TYPE_CHECKING:
    from vllm import LLM

PROSE_TOKENS = 200


@contextlib.contextmanager
def started(model: pathlib.Path) -> Iterator["LLM"]:
    """An engine in fp32, where its tokens equal the plain reference's; it drafts wherever it can, since what is counted
    here should not depend on what steps cost on this machine."""
    with start_llm(
        model,
        skip_tokenizer_init=False,
        additional_config={"diffusion": {"passes_per_step": 16, "draft_policy": "always"}},
        dtype="float32",
        max_model_len=512,
        max_num_seqs=64,
        enforce_eager=True,
        kv_cache_memory_bytes=128 << 20,
    ) as llm:
        yield llm


def ask(llm: "LLM", items: Sequence[Item], mode: str, **settings: float) -> Outcome:
    """All questions under one setting, greedily, ending at the end of sequence."""
    from vllm_twotower import diffusion_params, diffusion_stats

    params = diffusion_params(mode=mode, temperature=0.0, max_tokens=MAX_TOKENS, **settings)
    diffusion_stats(llm, reset=True)
    outputs = [o.outputs[0] for o in llm.generate([item.prompt for item in items], params, use_tqdm=False)]
    stats = diffusion_stats(llm)
    tokens = sum(len(o.token_ids) for o in outputs)
    ended = [o.finish_reason == "stop" for o in outputs]
    # AR: the first token comes from the prompt's own forward, every later one from a forward of its own
    of_mode = {"mask_diffusion": stats["commits"], "self_speculation": stats["drafts"], "ar": tokens - len(items)}
    context_passes = of_mode[mode]
    return Outcome(
        shares(items, [o.text if end else None for o, end in zip(outputs, ended, strict=True)]),
        len(outputs) - sum(ended),
        tokens,
        stats["denoise_passes"],
        context_passes,
    )


def bits_per_byte(llm: "LLM", texts: Sequence[str]) -> float:
    """Of prose, by the context tower; each text from its start, at most ``PROSE_TOKENS`` tokens."""
    from vllm_twotower import diffusion_params

    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(text)[:PROSE_TOKENS] for text in texts]
    params = diffusion_params(mode="ar", temperature=0.0, max_tokens=1, prompt_logprobs=0)
    nats = 0.0
    for output in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False):
        scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        nats -= sum(at[token].logprob for token, at in scored)
    num_bytes = sum(len(tokenizer.decode(p, skip_special_tokens=True).encode()) for p in prompts)
    return nats / math.log(2) / num_bytes
