"""The engine against its two yardsticks on one workload, side by side: ``python -m benchmarks.run generate``.

``mask_diffusion`` and ``self_speculation`` are the engine with diffusion, ``ar`` vLLM's own decoding of the context
tower alone, ``reference`` plain-torch mask diffusion, one request after the other. All in fp32, greedy, to the end of
sequence, with the same number of threads, on the same held-out prompts: questions, or beginnings of texts to be
continued, where the demo model is rarely sure and takes some fifteen passes per canvas. ``mask_diffusion`` must write
what ``reference`` writes and ``self_speculation`` what ``ar`` writes, else there is no figure.

All engines live in one process and take turns, one step each, always the one that has used the least time so far. So
a slow second of a shared machine is every engine's; run one after the other, two engines with equal work have been
seen to differ by a third. Each has a clock of its own, which stands while another one works.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.machine import described
from benchmarks.markdown_table import table
from benchmarks.paths import RESULTS
from tests.harness.engine import find_runner, read_clock, start_llm

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

YARDSTICKS = {"mask_diffusion": "reference", "self_speculation": "ar"}
"""Whose tokens each engine with diffusion has to write."""
ENGINES = (*YARDSTICKS, "ar", "reference")
PARITY = [
    "tests/test_reference_goldens.py",
    "tests/test_engine_goldens.py",
    "tests/test_runner_kernels.py",
    "tests/test_self_speculation.py",
]
MAX_MODEL_LEN = 512
BEGINNING = 60
"""Characters of a text that is to be continued."""


class OwnClock:
    """Seconds that one of several engines has worked; it stands while it is that of nobody's turn."""

    def __init__(self) -> None:
        self._before, self._since = 0.0, None

    def read(self) -> float:
        return self._before + (0.0 if self._since is None else read_clock() - self._since)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Our turn."""
        self._since = read_clock()
        try:
            yield
        finally:
            self._before, self._since = self.read(), None


@dataclass
class Timing:
    """One workload on one engine. Seconds."""

    clock: OwnClock = field(default_factory=OwnClock)
    outputs: list[list[int]] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    between_arrivals: list[float] = field(default_factory=list)
    """Gaps between the arrivals of one request's tokens: of canvases, in AR of single tokens."""
    context: float = 0.0
    denoiser: float = 0.0
    denoise_passes: int = 0
    context_passes: int = 0
    """Of rows, without those of prompts."""
    canvases: int = 0
    errors: int = 0

    def row(self, engine: str, batch: int) -> dict[str, Any]:
        tokens, total = sum(len(o) for o in self.outputs), self.clock.read()
        host = total - self.context - self.denoiser
        per_canvas = 1e3 / self.canvases if self.canvases else None
        return {
            "engine": engine,
            "batch": batch,
            "requests": len(self.outputs),
            "tokens": tokens,
            "tokens_per_s": round(tokens / total, 1),
            "tokens_per_forward": round(tokens / (self.denoise_passes + self.context_passes), 2),
            "ttft_ms_p50": round(1e3 * statistics.median(self.first_token), 1),
            "gap_ms_p50": round(1e3 * statistics.median(self.between_arrivals or [0.0]), 1),
            "context_share": round(self.context / total, 3),
            "denoiser_share": round(self.denoiser / total, 3),
            "host_share": round(host / total, 3),
            "towers_ms_per_canvas": per_canvas and round((self.context + self.denoiser) * per_canvas, 1),
            "host_ms_per_canvas": per_canvas and round(host * per_canvas, 1),
            "errors": self.errors,
        }


def questions(count: int, seed: int = 1) -> list[str]:
    """Held-out questions of all task families in turn."""
    from tools.demo_training.tasks import FAMILIES, instances

    sources = [instances(family, seed, held_out=True) for family in FAMILIES]
    return [next(sources[i % len(sources)]).prompt for i in range(count)]


def beginnings(count: int) -> list[str]:
    """Of held-out verses, to be continued."""
    from tools.demo_training.text import documents

    verses = (text for text in documents(held_out=True)["bible"] if len(text) > 2 * BEGINNING)
    return [text[:BEGINNING] for text in itertools.islice(verses, count)]


WORKLOADS = {"questions": questions, "beginnings": beginnings}


def timed(owner: Any, name: str, add: Callable[[float], None]) -> None:
    """Report how long each call of a tower takes."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = read_clock()
        result = function(*args, **kwargs)
        add(read_clock() - started)
        return result

    setattr(owner, name, call)


class EngineRun:
    """vLLM in this process, with or without diffusion."""

    def __init__(self, llm: Any, diffusion: bool, max_tokens: int) -> None:
        self.llm, self.diffusion, self.max_tokens, self.timing = llm, diffusion, max_tokens, Timing()
        network = find_runner(llm).model
        timed(network.model, "forward", lambda s: setattr(self.timing, "context", self.timing.context + s))
        if self.diffusion:
            for name in ("forward", "logits"):
                timed(network.denoiser, name, lambda s: setattr(self.timing, "denoiser", self.timing.denoiser + s))

    def steps(self, prompts: Sequence[str], batch: int, timing: Timing) -> Iterator[None]:
        """``batch`` requests at a time, the next one as soon as one ends; a turn is an engine's step."""
        from vllm import SamplingParams

        from vllm_twotower import diffusion_stats

        engine, now = self.llm.llm_engine, timing.clock.read
        self.timing = timing
        params = SamplingParams(temperature=0.0, max_tokens=self.max_tokens)
        if self.diffusion:
            diffusion_stats(self.llm, reset=True)
        queue = iter(enumerate(prompts))
        last_seen: dict[str, float] = {}
        outputs: dict[str, list[int]] = {}

        def send(count: int) -> None:
            for index, prompt in itertools.islice(queue, count):
                engine.add_request(str(index), prompt, params.clone())
                last_seen[str(index)] = now()

        send(batch)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
                if len(tokens) > len(outputs.get(output.request_id, [])):
                    gaps = timing.between_arrivals if output.request_id in outputs else timing.first_token
                    gaps.append(now() - last_seen[output.request_id])
                    last_seen[output.request_id], outputs[output.request_id] = now(), tokens
                timing.errors += output.outputs[0].finish_reason not in (None, "stop", "length")
                send(int(output.finished))
            yield
        timing.outputs = [outputs[str(i)] for i in range(len(prompts))]
        if self.diffusion:
            stats = diffusion_stats(self.llm)
            timing.denoise_passes = stats["denoise_passes"]
            timing.context_passes = stats["context_passes"] - len(prompts)  # a prompt takes one step here
            timing.canvases = stats["canvases"]
        else:
            timing.context_passes = sum(len(o) - 1 for o in timing.outputs)


class ReferenceRun:
    """``oracle/reference.py`` over the plain towers, request after request."""

    def __init__(self, model: pathlib.Path, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        from vllm_twotower.oracle.plain_towers import PlainTwoTower

        self.towers = PlainTwoTower.load(model)
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.eos, self.max_tokens = json.loads((model / "config.json").read_text())["eos_token_id"], max_tokens

    def steps(self, prompts: Sequence[str], batch: int, timing: Timing) -> Iterator[None]:
        """A turn is a request."""
        assert batch == 1
        for prompt in prompts:
            self._one(self.tokenizer.encode(prompt).ids, timing)
            yield

    @torch.inference_mode()
    def _one(self, prompt: list[int], timing: Timing) -> None:
        from vllm_twotower.oracle.plain_towers import ContextCache
        from vllm_twotower.oracle.reference import MaskDiffusion, generate_mask_diffusion

        cache, arrivals = ContextCache(), [read_clock()]

        def extend(tokens: Sequence[int]) -> None:
            before = read_clock()
            self.towers.extend_context(torch.tensor([tokens]), cache)
            timing.context += read_clock() - before

        def denoise(canvas: Sequence[int], level: float) -> torch.Tensor:
            before = read_clock()
            logits = self.towers.denoise(torch.tensor([canvas]), torch.tensor([level]), cache)[0]
            timing.denoiser += read_clock() - before
            return logits

        def commit(canvas: Sequence[int]) -> None:
            arrivals.append(read_clock())
            if self.eos not in canvas:  # nothing follows the last canvas
                timing.context_passes += 1
                extend(canvas)

        extend(prompt)
        result = generate_mask_diffusion(prompt, self.max_tokens, denoise, commit, MaskDiffusion(eos_token_id=self.eos))
        tokens = list(result.token_ids)[: self.max_tokens]
        timing.outputs.append(tokens[: tokens.index(self.eos) + 1] if self.eos in tokens else tokens)
        timing.denoise_passes += result.num_denoise_passes
        timing.canvases += len(result.canvases)
        timing.first_token.append(arrivals[1] - arrivals[0])
        timing.between_arrivals += [b - a for a, b in itertools.pairwise(arrivals[1:])]


@contextlib.contextmanager
def started(engine: str, args: Any) -> Iterator[EngineRun | ReferenceRun]:
    """An engine ready to be timed."""
    if engine == "reference":
        yield ReferenceRun(args.model, args.max_tokens)
        return
    diffusion = {"mode": engine, "passes_per_step": args.passes_per_step} if engine in YARDSTICKS else None
    with start_llm(
        args.model,
        skip_tokenizer_init=False,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max(args.batches),
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"diffusion": diffusion} if diffusion else {},
    ) as llm:
        yield EngineRun(llm, diffusion is not None, args.max_tokens)


def run_in_turns(runs: dict[str, EngineRun | ReferenceRun], prompts: Sequence[str], batch: int) -> dict[str, Timing]:
    """One workload on every engine; the next turn is always that of the engine which has worked least."""
    timings = {engine: Timing() for engine in runs}
    left = {engine: run.steps(prompts, batch, timings[engine]) for engine, run in runs.items()}
    while left:
        engine = min(left, key=lambda one: timings[one].clock.read())
        with timings[engine].clock.running():
            try:
                next(left[engine])
            except StopIteration:
                del left[engine]
    return timings


def measure(args: Any) -> list[dict[str, Any]]:
    """Every engine at every batch; the reference, which has no batches, once."""
    rows, written = [], {}
    prompts = WORKLOADS[args.workload](args.requests)
    with contextlib.ExitStack() as engines:
        runs = {engine: engines.enter_context(started(engine, args)) for engine in args.engine}
        torch.set_num_threads(args.threads)
        for batch in args.batches:
            batched = {engine: run for engine, run in runs.items() if batch == 1 or engine != "reference"}
            run_in_turns(batched, prompts, batch)  # untimed: oneDNN compiles a product for every new number of tokens
            for engine, timing in run_in_turns(batched, prompts, batch).items():
                written[engine, batch] = timing.outputs
                rows.append({**timing.row(engine, batch), "threads": torch.get_num_threads()})
                print("| " + " | ".join(str(v) for v in rows[-1].values()) + " |", flush=True)
    rows.sort(key=lambda row: args.engine.index(row["engine"]))
    require_same(written)
    return rows


def require_same(written: dict[tuple[str, int], list[list[int]]]) -> None:
    """Each engine wrote what its yardstick wrote, and the same at every batch."""
    first_of = {engine: outputs for (engine, _), outputs in reversed(written.items())}
    for (engine, batch), outputs in written.items():
        yardstick = YARDSTICKS.get(engine, engine)
        expected = first_of.get(yardstick, first_of[engine])
        if differing := [i for i, (a, b) in enumerate(zip(outputs, expected, strict=True)) if a != b]:
            raise SystemExit(f"{engine} at batch {batch}: requests {differing} differ from {yardstick}: no figures")


def add_arguments(parser: Any) -> None:
    """The command's options."""
    from vllm_twotower.commands.cli import DEMO_MODEL

    parser.add_argument("--model", type=pathlib.Path, default=DEMO_MODEL)
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=32, help="prompts, so many at a time as the batch says")
    parser.add_argument("--workload", choices=WORKLOADS, default="beginnings")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on every engine")
    parser.add_argument("--passes-per-step", type=int, default=4)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the table and the picture")
    parser.add_argument("--skip-tests", action="store_true", help="for work on this script; writes no file")


def report(rows: list[dict[str, Any]], environment: dict[str, Any], args: Any) -> None:
    """JSON, a table and a picture."""
    out = args.out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    name = f"generate-{args.workload}-{'gpu' if environment['gpu'] else 'cpu'}"
    settings = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(args).items() if k != "run"}
    settings["model"] = args.model.name
    content = {"environment": environment, "arguments": settings, "rows": rows}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    command = shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]])
    lines = [
        "# Whole generations, one workload",
        "",
        f"Written by `{command}`; {described(environment)}.",
        "",
        *table(rows),
    ]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    draw(rows, out / f"{name}.png")


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Tokens per second over the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        if engine == "reference":
            axis.axhline(own[0]["tokens_per_s"], color="grey", linestyle=":", label="plain-torch reference, one by one")
        else:
            axis.plot([r["batch"] for r in own], [r["tokens_per_s"] for r in own], marker="o", label=engine)
    axis.set(xlabel="requests at once", ylabel="tokens / s", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
