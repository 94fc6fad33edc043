"""Generation you can watch: canvases printed as they fill in, and the table of what it took."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_twotower import diffusion_stats
from vllm_twotower.config import CONFIG_KEY, mask_token_id_of

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

MASKED = "░░"
"""Stands for one undecided token on the screen."""


@dataclass(frozen=True)
class Recording:
    """One request, pass by pass."""

    prompt: str
    passes: list[dict[str, Any]]
    """As ``runtime.trace.CanvasTrace`` records them."""
    token_ids: list[int]
    """What the request returned."""
    text: str


@dataclass(frozen=True)
class Run:
    """What one batch of prompts took."""

    title: str
    num_tokens: int
    """Tokens the requests returned, up to and including an end-of-sequence token."""
    num_denoise_passes: int
    num_context_passes: int
    """Context-tower forwards after the prompts': commits, or one per token in AR."""
    seconds: float
    recordings: list[Recording]
    """By prompt, in order."""

    @property
    def tokens_per_forward(self) -> float:
        """Returned tokens over denoise passes and context forwards after the prompts'."""
        return self.num_tokens / max(1, self.num_denoise_passes + self.num_context_passes)


def start_engine(model: str, **settings: Any) -> "LLM":
    """A small engine for looking at things: eager, one process, a few requests."""
    from vllm import LLM

    diffusion = {CONFIG_KEY: True}
    return LLM(model, additional_config=diffusion, max_model_len=512, max_num_seqs=8, enforce_eager=True, **settings)


def write_live(llm: "LLM", prompts: list[str], params: "SamplingParams", title: str) -> Run:
    """Generate for all prompts in one batch and print the text as the engine emits it."""
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    diffusion_stats(llm, reset=True)
    llm.collective_rpc("diffusion_trace_start")
    prompt_of = {str(index): prompt for index, prompt in enumerate(prompts)}
    for request, prompt in prompt_of.items():
        engine.add_request(request, prompt, params.clone())
    mask = mask_token_id_of(engine.vllm_config.model_config.hf_config)
    shown, finished = _Screen(tokenizer, prompt_of, mask), []
    passes_of: dict[str, list[dict[str, Any]]] = {request: [] for request in prompt_of}
    started = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        for internal_id, passes in llm.collective_rpc("diffusion_trace_take")[0].items():
            request = internal_id.split("-")[0]  # the engine adds a suffix of its own
            passes_of[request] += passes
            shown.passes(request, passes)
        for output in outputs:
            shown.emitted(output)
            if output.finished:
                finished.append(output)
    seconds = time.perf_counter() - started
    stats = diffusion_stats(llm)
    shown.texts(finished)
    return Run(
        title,
        sum(len(o.outputs[0].token_ids) for o in finished),
        stats["denoise_passes"],
        stats["commits"] if stats["canvases"] else stats["context_passes"] - len(prompts),
        seconds,
        [
            Recording(prompt_of[o.request_id], passes_of[o.request_id], list(o.outputs[0].token_ids), o.outputs[0].text)
            for o in sorted(finished, key=lambda o: int(o.request_id))
        ],
    )


class _Screen:
    """Prints canvases pass by pass."""

    def __init__(self, tokenizer: Any, prompt_of: dict[str, str], mask_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.prompt_of = prompt_of
        self.num_passes: dict[str, int] = dict.fromkeys(prompt_of, 0)
        self.num_tokens: dict[str, int] = dict.fromkeys(prompt_of, 0)

    def passes(self, request: str, passes: list[dict[str, Any]]) -> None:
        for canvas in (p["tokens"] for p in passes):
            if all(token == self.mask_token_id for token in canvas):
                self.num_passes[request] = 0
            self.num_passes[request] += 1
            print(f"  [{request}] pass {self.num_passes[request]:2d} │{self._text(canvas)}", flush=True)

    def emitted(self, output: Any) -> None:
        request, tokens = output.request_id, list(output.outputs[0].token_ids)
        new, self.num_tokens[request] = tokens[self.num_tokens[request] :], len(tokens)
        if self.num_passes[request]:
            count = self.num_passes[request]
            self.num_passes[request] = 0
            print(f"  [{request}] commit  │{self._text(new)}│ {len(new)} tokens in {count} passes", flush=True)

    def texts(self, outputs: list[Any]) -> None:
        print()
        for output in sorted(outputs, key=lambda o: o.request_id):
            print(f"  {self.prompt_of[output.request_id]}\033[1m{output.outputs[0].text}\033[0m")

    def _text(self, tokens: list[int]) -> str:
        pieces = [MASKED if token == self.mask_token_id else self.tokenizer.decode([token]) for token in tokens]
        return "".join(pieces).replace("\n", "⏎")


def print_table(runs: list[Run]) -> None:
    """Print one line per run."""
    print("| mode | tokens | denoise passes | context passes | tokens per forward | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for run in runs:
        print(
            f"| {run.title} | {run.num_tokens} | {run.num_denoise_passes} | {run.num_context_passes} "
            f"| {run.tokens_per_forward:.2f} | {run.seconds:.1f} |"
        )
