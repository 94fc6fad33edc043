"""``vllm-twotower demo``: watch the demo model write, then compare three ways to let it."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_twotower import diffusion_params
from vllm_twotower.commands.live import (
    MASKED,
    PLAIN,
    STRUCK,
    Run,
    in_one_line,
    start_engine,
    write_live,
    write_silently,
)
from vllm_twotower.core import DEFAULT_CONFIDENCE_THRESHOLD, Mode

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

DEMO_QUESTIONS = {
    "Price list\nleaf: 386\nknife: 977\norange: 177\nplum: 855\napple: 716\ntable: 262\n"
    "How much are these: table apple knife?": "table:262 apple:716 knife:977",
    "Fill in the total column\nhat: 8 at 8 each\nwheel: 6 at 7 each\nnail: 9 at 8 each": (
        "hat 8x8=64 wheel 6x7=42 nail 9x8=72"
    ),
    "guests: Hana Cleo Nora Omar\nteam: Kai Ann\npaint: purple white\nshelf: purple orange spoon plate\n"
    "Write as JSON: team shelf": '{"team": "Kai Ann", "shelf": "purple orange spoon plate"}',
    "Tara has 51 of kettle, then gets 15, gives away 27, buys 23. How many now?": "51+15=66 66-27=39 39+23=62",
    "Trace d\nd = 82\nd += 9\nd += 8\nd -= 23\nd += 6": "82+9=91+8=99-23=76+6=82",
    "Convert: 11 weeks to days, 10 years to months": "11 weeks=77 days 10 years=120 months",
    "It is Wednesday. Move by days: +7 +8 -9 +4 -9 -3": (
        "Wednesday +7 Wednesday +8 Thursday -9 Tuesday +4 Saturday -9 Thursday -3 Monday"
    ),
    "It is May. Move by months: +4 -9 +6 +5 -5 -3": "May +4 September -9 December +6 June +5 November -5 June -3 March",
    "Reverse, then upper case: g r x i o a q p z": "z p q a o i x r g | Z P Q A O I X R G",
    "Sort: i70 q19 a98 s88 j95 l95 v36 r62": "a98 i70 j95 l95 q19 r62 s88 v36",
    "Print s after each line\ns = 'i n z m'.split()\ns.append('w')\ns.pop()\ns.reverse()": (
        "i n z m w > i n z m > m z n i"
    ),
}
"""Of each family that the demo model was trained on the first question of ``make quality``, chosen by nothing else, and
its right answer. Training has not shown them."""
DEMO_QUESTION_END = "\nAnswer:"
"""How every question ended in training; what the model's chat template adds."""
NUM_WATCHED = 3
"""Questions whose answers are shown as they appear, at most: the first ones."""


@dataclass(frozen=True)
class Way:
    """One way to decode."""

    title: str
    mode: Mode


AR = Way("ar", Mode.AR)
MASK_DIFFUSION = Way(f"mask diffusion {DEFAULT_CONFIDENCE_THRESHOLD}", Mode.MASK_DIFFUSION)
SELF_SPECULATION = Way("self-speculation", Mode.SELF_SPECULATION)
WAYS = (AR, MASK_DIFFUSION, SELF_SPECULATION)
"""The baseline, the published settings, and the baseline's own tokens in fewer forwards."""
_LABEL_WIDTH = 30


def demo_prompt(question: str) -> str:
    """As the demo model was trained on it."""
    return question.replace("\\n", "\n").removesuffix(DEMO_QUESTION_END) + DEMO_QUESTION_END


def show_demo(model: pathlib.Path, own_questions: Sequence[str] | None, max_tokens: int) -> None:
    """Print answers as they appear, then the comparison.

    Args:
        model: the demo model's folder.
        own_questions: asked in place of those built in; what is right is then what AR answers.
        max_tokens: of each answer at most.

    """
    print(f"Starting vLLM with the demo model ({model.name}), a few seconds ...", flush=True)
    # in fp32, where every machine writes the same tokens
    llm = start_engine(str(model), dtype="float32", kv_cache_memory_bytes=64 << 20)
    prompts = [demo_prompt(question) for question in own_questions or DEMO_QUESTIONS]
    watched = prompts[:NUM_WATCHED]
    print(f"\n=== Mask diffusion: every pass decides some tokens of a canvas; {MASKED} is a token not decided yet")
    write_live(llm, watched, _params(MASK_DIFFUSION, max_tokens), MASK_DIFFUSION.title)
    print(
        "\n=== Self-speculation: the denoiser drafts a canvas, the context tower keeps what it would have written too;"
        f"\n    {STRUCK}struck out{PLAIN} is what it did not, ‹› is its own token"
    )
    write_live(llm, watched, _params(SELF_SPECULATION, max_tokens), SELF_SPECULATION.title)
    runs = _compare_ways(llm, prompts, max_tokens)
    print(f"\n=== The same {len(prompts)} questions three ways, each way all at once")
    print_comparison(runs, None if own_questions else list(DEMO_QUESTIONS.values()))


def _params(way: Way, max_tokens: int) -> "SamplingParams":
    return diffusion_params(mode=way.mode, temperature=0.0, max_tokens=max_tokens)


def _compare_ways(llm: "LLM", prompts: list[str], max_tokens: int) -> list[Run]:
    """One run for each of ``WAYS``, timed when all three have run once, because first steps are slow."""
    for way in WAYS:
        write_silently(llm, prompts, _params(way, max_tokens), way.title)
    return [write_silently(llm, prompts, _params(way, max_tokens), way.title) for way in WAYS]


def print_comparison(runs: Sequence[Run], right_answers: Sequence[str] | None) -> None:
    """Print a column for each run: each answer right or wrong, then the sums, the wrong answers, and what the trade is.

    Args:
        runs: of ``WAYS``, in that order.
        right_answers: by prompt; None: AR's own, from which the others differ or not.

    """
    answers = [[recording.text.strip() for recording in run.recordings] for run in runs]
    expected = answers[0] if right_answers is None else right_answers
    good, bad = ("as ar", "DIFFERS") if right_answers is None else ("right", "WRONG")
    reference = "ar wrote" if right_answers is None else "right is"
    is_good = [[answer == wanted for answer, wanted in zip(column, expected, strict=True)] for column in answers]
    _print_row("", [run.title for run in runs])
    for index, recording in enumerate(runs[0].recordings):
        question = in_one_line(recording.prompt.removesuffix(DEMO_QUESTION_END))
        short = question if len(question) < _LABEL_WIDTH - 2 else f"{question[: _LABEL_WIDTH - 3]}…"
        _print_row(short, [good if column[index] else bad for column in is_good])
    print()
    _print_row(good, [f"{sum(column)} of {len(column)}" for column in is_good])
    _print_row("tokens per forward", [f"{run.tokens_per_forward:.1f}" for run in runs])
    _print_row("seconds", [f"{run.seconds:.2f}" for run in runs])
    print()
    for run, column, marks in zip(runs, answers, is_good, strict=True):
        for answer, wanted, mark in zip(column, expected, marks, strict=True):
            if not mark:
                print(f"  {run.title + ' wrote':<{_LABEL_WIDTH}}{in_one_line(answer)}")
                print(f"  {reference:<{_LABEL_WIDTH}}{in_one_line(wanted)}")
    print(f"\nThe trade: {_describe_trade(runs, is_good, right_answers is None)}")
    print("The seconds are this machine's, for 2.5 million parameters a tower; they say nothing about the 30B model.")


def _describe_trade(runs: Sequence[Run], is_good: Sequence[Sequence[bool]], against_ar: bool) -> str:
    """What more tokens per forward cost, in the figures of these runs."""
    ar, diffusion, speculation = (f"{run.tokens_per_forward:.1f}" for run in runs)
    num_bad, count = len(is_good[1]) - sum(is_good[1]), len(is_good[1])
    what = "unlike AR's" if against_ar else "wrong"
    return (
        f"{diffusion} tokens per forward with {num_bad} of {count} answers {what} (mask diffusion), or AR's own "
        f"answers at {speculation} (self-speculation) instead of {ar} (AR)."
    )


def _print_row(label: str, columns: Sequence[str]) -> None:
    """One line of the comparison, in columns as wide as the ways' titles, or as a count of answers."""
    cells = [f"{text:>{max(10, len(way.title) + 2)}}" for way, text in zip(WAYS, columns, strict=True)]
    print(f"  {label:<{_LABEL_WIDTH}}{''.join(cells)}")
