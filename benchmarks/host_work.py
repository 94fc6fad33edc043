"""What the host does in one denoise step beside the towers, by part: ``python -m benchmarks.host_work``.

Engines in this process, every step over exactly 1, 8, 32 and 64 requests, in lockstep: gamma is 1, so that each canvas
takes as many passes as it has positions. Beside it a decode step of vLLM alone over as many requests, because most of
what an engine does in a step it does in any. A clock counts each part's own time, without that of the parts it calls;
medians over the steps. One thread, the demo model, one pass a step.

``towers`` are forwards and heads. ``kernels`` are the ops outside the towers, and what on a CPU stands in for the model
runner's Triton kernels (``cpu/runner_kernels.py``): a GPU's host launches these. The rest is the host's: ``vLLM`` its
own code, ``ours`` this package's. Small tensors count as the host's, and on a CPU that includes their arithmetic.
"""

import argparse
import contextlib
import enum
import os
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from benchmarks.machine import described, environment
from benchmarks.markdown_table import table
from benchmarks.paths import RESULTS
from tests.harness.engine import find_runner, find_scheduler, start_llm
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.core import StepKind

if TYPE_CHECKING:
    from vllm import LLM

WARM_UP = 8
"""Steps of a batch that do not count: oneDNN compiles products for new shapes, buffers are touched first."""
PROMPT_TOKENS = 16


class Whose(enum.StrEnum):
    """Who would have to change to make a part faster."""

    TOWERS = "towers"
    KERNELS = "kernels"
    VLLM = "vLLM"
    OURS = "ours"


@dataclass(frozen=True)
class Part:
    """What some functions of a step are added up as."""

    whose: Whose
    what: str


Watched = tuple[Any, str, Part]
"""Owner of a function, its name there, and what its time counts as."""


class PartClock:
    """Seconds by part; a function's own, without those of watched functions that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[Part] = Counter()
        self._inside: list[float] = []

    def timed(self, function: Callable[..., Any], part: Part) -> Callable[..., Any]:
        """The function, whose calls count as a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                total = time.perf_counter() - started
                self.seconds[part] += total - self._inside.pop()
                if self._inside:
                    self._inside[-1] += total

        return call

    @contextlib.contextmanager
    def watching(self, functions: Iterable[Watched]) -> Iterator[None]:
        """These functions count while inside."""
        with contextlib.ExitStack() as stack:
            for owner, name, part in functions:
                stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name), part)))
            yield


def list_stand_ins() -> list[Watched]:
    """What replaces the model runner's kernels, as far as a step of running requests calls it."""
    import vllm.v1.worker.gpu.model_runner as model_runner
    import vllm.v1.worker.gpu.model_states.mamba_hybrid as mamba_hybrid
    import vllm.v1.worker.gpu.sample.sampler as sampler
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor
    from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext
    from vllm.v1.worker.utils import KVBlockZeroer

    names = {
        model_runner: (
            "prepare_prefill_inputs",
            "prepare_pos_seq_lens",
            "combine_sampled_and_draft_tokens",
            "post_update",
        ),
        sampler: ("gumbel_sample", "get_num_sampled_and_rejected"),
        BlockTables: ("gather_block_tables", "compute_slot_mappings"),
        FusedStagedWriter: ("apply",),
        StagedWriteTensor: ("apply_write",),
        KVBlockZeroer: ("zero_block_ids",),
        MambaSpecDecodeGPUContext: ("run_fused_precopy", "run_fused_postprocess_align"),
        mamba_hybrid.preprocess_mamba_align_fused_kernel: ("function",),
        mamba_hybrid._scatter_num_accepted_kernel: ("function",),
    }
    part = Part(Whose.KERNELS, "stand-ins for the runner's")
    return [(owner, name, part) for owner, of_owner in names.items() for name in of_owner]


def list_vllms(llm: "LLM") -> list[Watched]:
    """What every engine's step goes through."""
    import vllm.v1.worker.gpu.model_states.mamba_hybrid as mamba_hybrid
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    engine, runner = llm.llm_engine, find_runner(llm)
    state_class = mamba_hybrid.MambaHybridModelState
    hooks = ("preprocess_state", "prepare_attn", "prepare_inputs", "postprocess_state")
    towers = ((runner.model.model, "forward"), (runner.model, "compute_logits"))
    return [
        *((owner, name, Part(Whose.TOWERS, "context")) for owner, name in towers),
        (engine, "step", Part(Whose.VLLM, "engine and core")),
        (engine.output_processor, "process_outputs", Part(Whose.VLLM, "outputs")),
        (Scheduler, "schedule", Part(Whose.VLLM, "schedule")),
        (Scheduler, "update_from_output", Part(Whose.VLLM, "update from output")),
        *((runner, name, Part(Whose.VLLM, "model runner")) for name in ("execute_model", "sample_tokens")),
        *((state_class, name, Part(Whose.VLLM, "model state")) for name in hooks),
        (mamba_hybrid, "build_attn_metadata", Part(Whose.VLLM, "attention metadata")),
        (Sampler, "__call__", Part(Whose.VLLM, "sampler")),
    ]


def list_ours(llm: "LLM") -> list[Watched]:
    """What diffusion adds to a step."""
    import vllm_twotower.runtime.denoise_graphs as denoise_graphs
    import vllm_twotower.runtime.denoise_loop as denoise_loop
    import vllm_twotower.runtime.proposals as proposals
    from vllm_twotower.runtime.sampler import CanvasSampler

    scheduler, runner = find_scheduler(llm), find_runner(llm)
    state, denoiser = runner.model_state, runner.model.denoiser
    hooks = ("find_step", "preprocess_state", "prepare_attn", "prepare_inputs", "postprocess_state")
    ours = [
        (scheduler, "schedule", "schedule"),
        (scheduler, "update_from_output", "update from output"),
        *((state, name, f"model state: {name}") for name in hooks),
        (state, "find_mamba_slots", "model state: find_mamba_slots"),
        (state.loop, "run", "passes, beside the tower"),
        (CanvasSampler, "__call__", "report"),
    ]
    return [
        *((owner, name, Part(Whose.OURS, what)) for owner, name, what in ours),
        *((denoiser, name, Part(Whose.TOWERS, "denoiser")) for name in ("forward", "logits")),
        (proposals, "canvas_sample", Part(Whose.KERNELS, "ops")),
        (denoise_loop, "reveal", Part(Whose.KERNELS, "ops")),
        (denoise_graphs, "build_attn_metadata", Part(Whose.VLLM, "attention metadata")),
    ]


def time_steps(llm: "LLM", num_rows: int, max_tokens: int, is_diffusion: bool) -> list[Counter[Part]]:
    """Seconds by part of every step over all of so many requests: denoise steps, or without diffusion decode steps."""
    from vllm import SamplingParams

    engine, scheduler, clock = llm.llm_engine, find_scheduler(llm), PartClock()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for row in range(num_rows):
        prompt = [5 + (7 * row + column) % 64 for column in range(PROMPT_TOKENS)]
        engine.add_request(f"{num_rows}-{row}", {"prompt_token_ids": prompt}, params.clone())
    functions = [*list_stand_ins(), *list_vllms(llm), *(list_ours(llm) if is_diffusion else [])]
    found = []
    with clock.watching(functions):
        while engine.has_unfinished_requests():
            clock.seconds.clear()
            num_answered = len(engine.step())
            if is_diffusion:
                is_wanted = (
                    scheduler.last_step.kind is StepKind.DENOISE and len(scheduler.last_step.req_ids) == num_rows
                )
            else:
                is_wanted = num_answered == num_rows
            if is_wanted:
                found.append(clock.seconds.copy())
    return found[WARM_UP:]


def measure(args: argparse.Namespace, is_diffusion: bool) -> dict[str, dict[Part, float]]:
    """Heading of a column -> milliseconds by part, medians over the steps of a batch."""
    diffusion = {"diffusion": {"confidence_threshold": 1.0}} if is_diffusion else {}
    columns = {}
    with start_llm(
        args.model,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=max(args.rows),
        max_num_batched_tokens=max(512, 16 * max(args.rows)),
        enforce_eager=True,
        async_scheduling=False,
        kv_cache_memory_bytes=256 << 20,
        additional_config=diffusion,
    ) as llm:
        torch.set_num_threads(1)
        for num_rows in args.rows:
            steps = time_steps(llm, num_rows, args.max_tokens, is_diffusion)
            parts = sorted({part for step in steps for part in step}, key=lambda part: (part.whose, part.what))
            medians = {part: 1e3 * statistics.median(step[part] for step in steps) for part in parts}
            heading = f"{'denoise' if is_diffusion else 'AR'}, {num_rows}"
            columns[heading] = medians
            print(f"{heading}: {len(steps)} steps, {sum(medians.values()):.2f} ms", flush=True)
    return columns


def tabulate(columns: dict[str, dict[Part, float]]) -> list[dict[str, Any]]:
    """A row for each part, and one for each of ``Whose``; milliseconds."""
    parts = dict.fromkeys(part for medians in columns.values() for part in medians)
    rows = []
    for whose in Whose:
        of_whose = [part for part in parts if part.whose is whose]
        for part in sorted(of_whose, key=lambda part: part.what):
            cells = {heading: medians.get(part) for heading, medians in columns.items()}
            rows.append({"": part.whose.value, "part": part.what, **cells})
        sums = {h: sum(medians.get(part, 0.0) for part in of_whose) for h, medians in columns.items()}
        rows.append({"": f"**{whose.value}**", "part": "", **sums})
    return [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--write", action="store_true", help="the table into benchmarks/results")
    args = parser.parse_args()
    columns = {**measure(args, is_diffusion=True), **measure(args, is_diffusion=False)}
    command = shlex.join(["python", "-m", "benchmarks.host_work", *sys.argv[1:]])
    lines = [
        "# Host work of a step",
        "",
        f"Written by `{command}`; {described(environment())}.",
        "",
        "Milliseconds of one step over so many requests, medians; what the parts are, `benchmarks/host_work.py` says.",
        "",
        *table(tabulate(columns)),
    ]
    if args.write:
        (RESULTS / "host-work.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
