"""The loop: two phases, a state file to go on from, a log of losses and held-out answers."""

import json
import pathlib
import time
from dataclasses import dataclass, field

import torch

from tools.demo_training import losses
from tools.demo_training.answers import decode, exact_match_ar, held_out_rows
from tools.demo_training.batches import Corpus, batches_from
from tools.demo_training.config import MODEL, PhaseConfig, TrainingConfig
from tools.demo_training.initial import context_weights, denoiser_weights
from tools.demo_training.optimizer import Optimizer
from tools.demo_training.towers import TrainingTowers
from vllm_twotower.oracle.plain_towers import CONTEXT, DENOISER, TowerShape

SAVE_EVERY_S = 120
LOG_EVERY = 25
CHECK_EVERY = 250


@dataclass
class Progress:
    """Where training stands; the tensors are beside it in the state file."""

    phase: str = "context"
    step: int = 0
    pool: int = 0
    index: int = 0
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)


class Trainer:
    """Trains from scratch or from a state file.

    Args:
        run: folder of ``state.pt`` and ``log.jsonl``.
        config: what to train.
        corpus: where batches come from.

    """

    def __init__(self, run: pathlib.Path, config: TrainingConfig, corpus: Corpus) -> None:
        self.run, self.config, self.corpus = run, config, corpus
        self.shape, self.progress = TowerShape.from_config(MODEL), Progress()
        self.noise = torch.Generator().manual_seed(config.seed + 1)
        self.held_out = held_out_rows(corpus.tokenizer, 10)
        torch.manual_seed(config.seed)
        self.weights = context_weights(self.shape)
        self.saved_optimizer: dict | None = None
        if (run / "state.pt").exists():
            self._load()

    def train(self) -> None:
        """Both phases, from where the state file left off."""
        if self.progress.phase == "context":
            self._phase(self.config.context)
            self.save(None, "context.pt")
            self.progress = Progress("denoiser", pool=10_000, log=self.progress.log)
            self.weights.update(denoiser_weights(self.weights, self.shape))
            self.save(None)
        self._phase(self.config.denoiser)
        self.save(None, "final.pt")

    def _phase(self, config: PhaseConfig) -> None:
        progress, towers = self.progress, TrainingTowers(self.weights, self.shape)
        in_context = progress.phase == "context"
        trained = {n: t for n, t in self.weights.items() if n.startswith((CONTEXT, "context_")) == in_context}
        optimizer = Optimizer(trained, config)
        if self.saved_optimizer is not None:
            optimizer.load_state_dict(self.saved_optimizer)
            self.saved_optimizer = None
        average, last, saved = None, time.time(), time.time()
        for pool, index, batch in batches_from(self.corpus, progress.pool, progress.index):
            if progress.step >= config.steps:
                break
            if in_context:
                loss, chosen = losses.next_token(towers, batch)
            else:
                loss, chosen = losses.masked_tokens(towers, batch, self.noise)
            loss.backward()
            optimizer.step(progress.step)
            self._balance(CONTEXT if in_context else DENOISER, chosen, config.balance_rate)
            average = loss.item() if average is None else 0.96 * average + 0.04 * loss.item()
            progress.step, progress.pool, progress.index = progress.step + 1, pool, index
            progress.seconds += min(time.time() - last, 5.0)  # a longer gap is a stopped process
            last = time.time()
            if progress.step % LOG_EVERY == 0:
                self._log({"loss": round(average, 4), "lr": round(optimizer.factor(progress.step), 3)})
            if progress.step % CHECK_EVERY == 0:
                self._check(towers)
            if time.time() - saved > SAVE_EVERY_S:
                self.save(optimizer)
                saved = time.time()
        for tensor in optimizer.parameters:
            tensor.requires_grad_(False)
        self.save(optimizer)

    def _balance(self, tower: str, chosen: losses.Chosen, rate: float) -> None:
        """Move each router's correction bias towards equal load (the bias chooses and does not weigh)."""
        for layer, count_E in chosen.items():
            bias = self.weights[f"{tower}.layers.{layer}.mixer.gate.e_score_correction_bias"]
            bias += rate * (count_E.mean() - count_E).sign()

    def _check(self, towers: TrainingTowers) -> None:
        """Exact match on held-out tasks, so far."""
        if self.progress.phase == "context":
            self._log({"ar": _rounded(exact_match_ar(towers, self.held_out))})
        else:
            shares, speed = decode(towers, self.held_out, threshold=0.8)
            self._log({"diffusion": _rounded(shares), "tokens_per_forward": round(speed, 2)})

    def _log(self, row: dict) -> None:
        p = self.progress
        row = {"phase": p.phase, "step": p.step, "minutes": round(p.seconds / 60, 1), **row}
        p.log.append(row)
        print(json.dumps(row), flush=True)

    def save(self, optimizer: Optimizer | None, name: str = "state.pt") -> None:
        """Everything needed to go on, written beside and renamed, so that a kill never leaves half a file."""
        self.run.mkdir(parents=True, exist_ok=True)
        state = {
            "weights": {n: t.detach() for n, t in self.weights.items()},
            "optimizer": optimizer.state_dict() if optimizer else None,
            "noise": self.noise.get_state(),
            "progress": vars(self.progress),
        }
        torch.save(state, self.run / f"{name}.part")
        (self.run / f"{name}.part").replace(self.run / name)

    def _load(self) -> None:
        state = torch.load(self.run / "state.pt", weights_only=True)
        self.weights, self.saved_optimizer = state["weights"], state["optimizer"]
        self.noise.set_state(state["noise"])
        self.progress = Progress(**state["progress"])


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in shares.items()}
