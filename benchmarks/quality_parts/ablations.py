"""The questions through the plain-torch reference with parts of the system switched off."""

import json
import pathlib
from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.quality_parts.ablated_towers import AblatedTwoTower, Ablation
from benchmarks.quality_parts.questions import MAX_TOKENS, Item, Outcome, shares
from vllm_twotower.oracle.plain_towers import TowerShape
from vllm_twotower.oracle.reference import MaskDiffusion

EOS = 2
CASES: dict[str, tuple[Ablation, dict]] = {
    "as published": (Ablation(), {}),
    "timestep frozen at 0.5": (Ablation(frozen_level=0.5), {}),
    "no Mamba seed": (Ablation(mamba_seed=False), {}),
    "causal attention in the canvas": (Ablation(bidirectional=False), {}),
    "one pass per canvas": (Ablation(), {"max_steps": 1}),
    "canvas 8": (Ablation(), {"canvas_length": 8, "max_steps": 8}),
    "canvas 32": (Ablation(), {"canvas_length": 32, "max_steps": 32}),
}


class PlainRun:
    """A checkpoint in plain torch, and the questions put to it one by one."""

    def __init__(self, model: pathlib.Path) -> None:
        self.weights = {n: t.float() for n, t in load_file(model / "model.safetensors").items()}
        self.shape = TowerShape.from_config(json.loads((model / "config.json").read_text()))
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    @torch.inference_mode()
    def ask(self, items: Sequence[Item], case: str) -> Outcome:
        """All questions at gamma 0.8."""
        ablation, changed = CASES[case]
        towers = AblatedTwoTower(self.weights, self.shape, ablation)
        settings = MaskDiffusion(confidence_threshold=0.8, eos_token_id=EOS, **changed)
        answers: list[str | None] = []
        tokens = passes = commits = 0
        for item in items:
            prompt = self.tokenizer.encode(item.prompt).ids
            result = towers.generate(prompt, MAX_TOKENS, settings)
            found = list(result.token_ids)
            ended = EOS in found
            found = found[: found.index(EOS) + 1] if ended else found
            answers.append(self.tokenizer.decode(found) if ended else None)
            tokens, passes = tokens + len(found), passes + result.num_denoise_passes
            commits += len(result.canvases) - 1  # the engine does not commit a last canvas
        return Outcome(shares(items, answers), answers.count(None), tokens, passes, commits)
