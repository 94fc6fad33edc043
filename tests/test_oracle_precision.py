"""The plain towers stay exact on long prompts: their chunked scan against the recurrence, a token at a time in fp64.

On a deep tower a small error of the scan does not stay small, and these towers judge near ties of everything else.
"""

import pytest
import torch

from tests.op_forms import scan_step_by_step
from tests.tolerances import DEEP_LOGITS
from tools.demo_training.initial import context_weights, denoiser_weights
from vllm_twotower.oracle import plain_towers
from vllm_twotower.oracle.plain_towers import DENOISER, ContextCache, PlainTwoTower, TowerShape, state_space_scan

RELEASED_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SHAPE = TowerShape(
    hybrid_override_pattern=RELEASED_PATTERN,
    vocab_size=256,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    mamba_num_heads=32,
    mamba_head_dim=4,
    n_groups=4,
    ssm_state_size=8,
    conv_kernel=4,
    n_routed_experts=2,
    num_experts_per_tok=2,  # all of them: a near tie of the router would hide what the scan is worth
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    routed_scaling_factor=2.5,
)
MASK, CANVAS = 3, 16


@pytest.fixture(scope="module")
def model():
    """A random checkpoint in the released layout, with the released pattern of layers; its logits differ as much as
    trained ones, its step sizes from token to token."""
    torch.manual_seed(0)
    weights = context_weights(SHAPE)
    weights.update(denoiser_weights(weights, SHAPE))
    for name, tensor in weights.items():
        if name.endswith("lm_head.weight"):
            tensor *= 50
        elif name.endswith("in_proj.weight"):
            tensor[-SHAPE.mamba_num_heads :] *= 5
        elif name.startswith((DENOISER, "t_block")):
            tensor += torch.randn_like(tensor) * 0.02
    return PlainTwoTower(weights, SHAPE)


def step_by_step(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, state_BHPN, chunk):
    """In place of ``state_space_scan``."""
    y, states = scan_step_by_step(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, state_BHPN)
    kept = [state.float() for t, state in enumerate(states, 1) if t % chunk == 0 or t == len(states)]
    return y.float(), kept


def logits_of(model, prompt):
    """Next-token logits after each token of the prompt, and a masked canvas's."""
    cache = ContextCache()
    hidden = model.extend_context(prompt, cache)
    canvas = torch.full((1, CANVAS), MASK)
    return torch.cat([model.context_logits(hidden), model.denoise(canvas, torch.ones(1), cache)], dim=1)


@pytest.mark.parametrize("length", [700, 1025])
@torch.inference_mode()
def test_long_prompts_through_a_deep_tower(model, length, monkeypatch):
    prompt = torch.randint(4, SHAPE.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    chunks = []

    def scan(*arguments):
        chunks.append((arguments[0].shape[1], arguments[-1]))
        return state_space_scan(*arguments)

    monkeypatch.setattr(plain_towers, "state_space_scan", scan)
    got = logits_of(model, prompt)
    assert SHAPE.chunk_size == 128
    assert set(chunks) == {(length, 128), (CANVAS, CANVAS)}
    monkeypatch.setattr(plain_towers, "state_space_scan", step_by_step)
    expected = logits_of(model, prompt)
    torch.testing.assert_close(got, expected, atol=DEEP_LOGITS, rtol=0)
