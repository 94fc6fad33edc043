"""Generation you can watch: canvases printed as they fill in, drafts as they are verified, and what it took."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_twotower import diffusion_stats
from vllm_twotower.config import CONFIG_KEY, read_mask_token_id

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

MASKED = "░░"
"""Stands for one undecided token on the screen."""
BOLD, STRUCK, PLAIN = "\033[1m", "\033[2;9m", "\033[0m"


@dataclass(frozen=True)
class Recording:
    """One request, step by step."""

    prompt: str
    records: list[dict[str, Any]]
    """As ``runtime.trace.CanvasTrace`` makes them."""
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
    """Context-tower forwards after the prompts': commits, verifications, or one per token in AR."""
    seconds: float
    recordings: list[Recording]
    """By prompt, in order."""

    @property
    def tokens_per_forward(self) -> float:
        """Returned tokens over denoise passes and context forwards after the prompts'."""
        return self.num_tokens / max(1, self.num_denoise_passes + self.num_context_passes)


def start_engine(model: str, **settings: Any) -> "LLM":
    """A small engine for looking at things: eager, one process, a few requests. In self-speculation it drafts wherever
    it can, so that drafts are seen however busy the machine is; a server drafts where that pays."""
    from vllm import LLM

    config: dict[str, Any] = {CONFIG_KEY: {"draft_policy": "always"}}
    return LLM(model, additional_config=config, max_model_len=512, max_num_seqs=16, enforce_eager=True, **settings)


def write_silently(llm: "LLM", prompts: list[str], params: "SamplingParams", title: str) -> Run:
    """Generate for all prompts in one batch, none of them read from the prefix cache, and record nothing."""
    llm.reset_prefix_cache()
    diffusion_stats(llm, reset=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return _sum_up(llm, title, prompts, outputs, [[] for _ in prompts], time.perf_counter() - started)


def write_live(llm: "LLM", prompts: list[str], params: "SamplingParams", title: str) -> Run:
    """Generate for all prompts in one batch and print the text as the engine emits it."""
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    diffusion_stats(llm, reset=True)
    llm.collective_rpc("diffusion_trace_start")
    prompt_of = {str(index): prompt for index, prompt in enumerate(prompts)}
    for request, prompt in prompt_of.items():
        engine.add_request(request, prompt, params.clone())
    mask = read_mask_token_id(engine.vllm_config.model_config.hf_config)
    screen, finished = _Screen(tokenizer, prompt_of, mask), []
    records_of: dict[str, list[dict[str, Any]]] = {request: [] for request in prompt_of}
    started = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        for internal_id, records in llm.collective_rpc("diffusion_trace_take")[0].items():
            request = internal_id.split("-")[0]  # the engine adds a suffix of its own
            records_of[request] += records
            screen.show_records(request, records)
        for output in outputs:
            screen.show_emitted(output)
            if output.finished:
                finished.append(output)
    seconds = time.perf_counter() - started
    llm.collective_rpc("diffusion_trace_stop")
    finished.sort(key=lambda o: int(o.request_id))
    screen.show_texts(finished)
    return _sum_up(llm, title, prompts, finished, list(records_of.values()), seconds)


def _sum_up(
    llm: "LLM",
    title: str,
    prompts: Sequence[str],
    outputs: "Sequence[RequestOutput]",
    records: Sequence[list[dict[str, Any]]],
    seconds: float,
) -> Run:
    """The run of some prompts, with outputs and records in the prompts' order."""
    stats = diffusion_stats(llm)
    answers = [output.outputs[0] for output in outputs]
    return Run(
        title,
        sum(len(answer.token_ids) for answer in answers),
        stats["denoise_passes"],
        stats["commits"] if stats["canvases"] else stats["context_passes"] - len(prompts),
        seconds,
        [
            Recording(prompt, own, list(answer.token_ids), answer.text)
            for prompt, own, answer in zip(prompts, records, answers, strict=True)
        ],
    )


class _Screen:
    """Prints canvases pass by pass, and drafts round by round."""

    def __init__(self, tokenizer: Any, prompt_of: dict[str, str], mask_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.num_passes: dict[str, int] = dict.fromkeys(prompt_of, 0)
        self.num_tokens: dict[str, int] = dict.fromkeys(prompt_of, 0)
        self.num_rounds: dict[str, int] = dict.fromkeys(prompt_of, 0)
        self.verified: dict[str, dict[str, Any]] = {}
        self.without_draft: dict[str, list[int]] = {request: [] for request in prompt_of}
        for request, prompt in prompt_of.items():
            print(f"  [{request}] {in_one_line(prompt)}", flush=True)

    def show_records(self, request: str, records: list[dict[str, Any]]) -> None:
        for record in records:
            if "drafts" in record:
                self.verified[request] = record
                continue
            canvas = record["tokens"]
            if all(token == self.mask_token_id for token in canvas):
                self.num_passes[request] = 0
            is_new_draft = self.num_passes[request] == 0 and canvas[0] != self.mask_token_id
            self.num_passes[request] += 1
            if not is_new_draft:  # which holds nothing yet
                print(f"  [{request}] pass {self.num_passes[request]:2d} │{self._text(canvas)}", flush=True)

    def show_emitted(self, output: "RequestOutput") -> None:
        request, tokens = output.request_id, list(output.outputs[0].token_ids)
        new, self.num_tokens[request] = tokens[self.num_tokens[request] :], len(tokens)
        verified, num_passes = self.verified.pop(request, None), self.num_passes[request]
        self.num_passes[request] = 0
        if verified is None:
            if num_passes:
                print(f"  [{request}] commit  │{self._text(new)}│ {len(new)} tokens in {num_passes} passes", flush=True)
        elif verified["drafts"]:
            self._show_round(request, new, verified)
        else:
            self.without_draft[request] += new
        if output.finished and self.without_draft[request]:
            print(f"  [{request}] ar      │{self._own_text(request, [])}", flush=True)

    def _show_round(self, request: str, new: list[int], verified: dict[str, Any]) -> None:
        self.num_rounds[request] += 1
        drafts, num_kept = verified["drafts"], verified["num_accepted"]
        before = self._own_text(request, [])
        kept, own = self._text(new[:num_kept]), self._own_text(request, new[num_kept:])
        # where the request has ended, what follows is nobody's
        rejected = self._text(drafts[num_kept:]) if len(new) > num_kept else ""
        struck = f"{STRUCK}{rejected}{PLAIN}" if rejected else ""
        print(
            f"  [{request}] round {self.num_rounds[request]:2d}│{before}{kept}{own}{struck}│ "
            f"{num_kept} of {len(drafts)} drafts kept",
            flush=True,
        )

    def _own_text(self, request: str, tokens: list[int]) -> str:
        """Tokens that the context tower wrote itself, marked: those not shown yet, and these."""
        own, self.without_draft[request] = self.without_draft[request] + tokens, []
        return f"{BOLD}‹{self._text(own)}›{PLAIN}" if own else ""

    def show_texts(self, outputs: "Sequence[RequestOutput]") -> None:
        print()
        for output in outputs:
            print(f"  [{output.request_id}]{BOLD}{output.outputs[0].text}{PLAIN}")

    def _text(self, tokens: list[int]) -> str:
        pieces = [MASKED if token == self.mask_token_id else self.tokenizer.decode([token]) for token in tokens]
        return in_one_line("".join(pieces))


def in_one_line(text: str) -> str:
    """Text with its line breaks as signs."""
    return text.replace("\n", "⏎")
