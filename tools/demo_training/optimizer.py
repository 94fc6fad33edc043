"""Muon for the matrices inside layers, AdamW for embeddings, heads, routers and everything that is not a matrix.

Muon (Jordan et al., 2024) orthogonalises each matrix's momentum, which on a run as short as this one halves the tokens
needed.
"""

import torch

from tools.demo_training.config import PhaseConfig

Weights = dict[str, torch.Tensor]


def is_inner_matrix(name: str, tensor: torch.Tensor) -> bool:
    """A projection within a layer."""
    return tensor.ndim == 2 and ".mixer." in name and "gate" not in name


class Optimizer:
    """Both optimizers and the schedule: warm-up, constant, linear decay (the paper's warm-up, stable, decay)."""

    def __init__(self, weights: Weights, config: PhaseConfig) -> None:
        self.config = config
        trained = {n: t for n, t in weights.items() if "correction_bias" not in n}
        matrices = [t for n, t in trained.items() if is_inner_matrix(n, t)]
        decayed = [t for n, t in trained.items() if not is_inner_matrix(n, t) and t.ndim == 2 and "table" not in n]
        rest = [t for n, t in trained.items() if not is_inner_matrix(n, t) and not (t.ndim == 2 and "table" not in n)]
        self.parameters = [*matrices, *decayed, *rest]
        for tensor in self.parameters:
            tensor.requires_grad_()
        self.muon = torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=config.weight_decay, ns_steps=4)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=config.other_lr, betas=(0.9, 0.98), fused=True)

    def factor(self, step: int) -> float:
        """Of the peak learning rates."""
        c = self.config
        return min(1.0, (step + 1) / c.warmup_steps, (c.steps - step) / (c.decay_fraction * c.steps))

    def step(self, step: int) -> None:
        """Clip, update, forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peak in ((self.muon, self.config.matrix_lr), (self.adam, self.config.other_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * max(0.0, self.factor(step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
