"""What a request's sampling parameters do to logits, plainly: one position at a time, in vLLM's order.

*Processed* logits are what confidence is read from: bias, allowed ids, minimum length, penalties, bad words. *Shaped*
scores only steer the proposal: temperature, min-p, top-k, top-p. The engine uses vLLM's own kernels for all of this
(``runtime/proposals.py``); tests compare the two.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

MASKED_OUT = float("-inf")


@dataclass(frozen=True, kw_only=True)
class LogitsRules:
    """Sampling parameters under vLLM's names; the defaults change nothing."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    """Token sequences; the last token of one is forbidden where the others stand right before it."""
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    """Forbidden among the first ``min_tokens`` generated tokens."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def process(self, logits_V: torch.Tensor, prompt: Sequence[int], left: Sequence[int]) -> torch.Tensor:
        """Processed logits of one position.

        Args:
            logits_V: float32, not written.
            prompt: prompt tokens.
            left: generated tokens up to this position, the mask id where a canvas is undecided; what stands to the
                right of the position is not looked at.

        """
        out_V = logits_V.clone()
        if self.allowed_token_ids:
            allowed = torch.tensor(list(self.allowed_token_ids))
            out_V = torch.full_like(out_V, MASKED_OUT).index_copy(0, allowed, out_V[allowed])
        for token, bias in self.logit_bias.items():
            out_V[token] += bias
        if len(left) < self.min_tokens:
            out_V[list(self.stop_token_ids)] = MASKED_OUT
        out_V = self._penalise(out_V, prompt, left)
        for word in self.bad_words:
            *before, last = word
            if len(left) >= len(before) and list(left[len(left) - len(before) :]) == before:
                out_V[last] = MASKED_OUT
        return out_V

    def _penalise(self, out_V: torch.Tensor, prompt: Sequence[int], left: Sequence[int]) -> torch.Tensor:
        counts_V = torch.zeros_like(out_V)
        for token, count in Counter(left).items():
            counts_V[token] = count
        seen_V = counts_V > 0
        in_prompt_V = torch.zeros_like(seen_V)
        in_prompt_V[list(prompt)] = True
        scale_V = torch.where(seen_V | in_prompt_V, self.repetition_penalty, 1.0)
        out_V = torch.where(out_V > 0, out_V / scale_V, out_V * scale_V)
        return out_V - self.frequency_penalty * counts_V - self.presence_penalty * seen_V

    def shape(self, scores_V: torch.Tensor) -> torch.Tensor:
        """Leave only what min-p, top-k and top-p leave of tempered scores."""
        out_V = scores_V.clone()
        if self.min_p > 0:
            probability_V = out_V.softmax(-1)
            out_V[probability_V < self.min_p * probability_V.max()] = MASKED_OUT
        if self.top_k > 0:
            out_V[out_V < out_V.topk(min(self.top_k, len(out_V))).values[-1]] = MASKED_OUT
        if self.top_p < 1:
            probability_V, order_V = out_V.softmax(-1).sort(descending=True)
            before_V = probability_V.cumsum(0) - probability_V
            out_V[order_V[before_V >= self.top_p]] = MASKED_OUT
        return out_V
