"""Every op against its definition, over odd shapes, with uninitialised memory poisoned."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32_OP

from vllm_twotower.ops import seeded_conv, seeded_scan


def step_by_step(x, dt, a, b, c, skip, dt_bias, state):
    """The recurrence as the Mamba-2 paper writes it, one token at a time, in fp64."""
    x, dt, a, b, c, skip, dt_bias, h = (t.double() for t in (x, dt, a, b, c, skip, dt_bias, state))
    per_group = x.shape[2] // b.shape[2]
    out = []
    for t in range(x.shape[1]):
        step = F.softplus(dt[:, t] + dt_bias)
        b_t, c_t = b[:, t].repeat_interleave(per_group, 1), c[:, t].repeat_interleave(per_group, 1)
        h = torch.exp(a * step)[..., None, None] * h + (step[..., None] * x[:, t])[..., None] * b_t[:, :, None]
        out.append((h * c_t[:, :, None]).sum(-1) + skip[:, None] * x[:, t])
    return torch.stack(out, dim=1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("rows", "width", "heads", "head_dim", "groups", "state_size"),
    [
        pytest.param(r, w, h, p, g, n, id=f"R{r} W{w} H{h} P{p} G{g} N{n}")
        for r, w, h, p, g, n in [
            (2, 16, 4, 8, 2, 16),
            (1, 16, 4, 8, 2, 16),
            (2, 1, 4, 8, 2, 16),
            (2, 32, 4, 8, 2, 16),
            (2, 7, 4, 8, 2, 16),
            (2, 16, 6, 8, 2, 16),
            (2, 16, 4, 5, 2, 16),
            (2, 16, 4, 8, 1, 16),
            (2, 16, 4, 8, 2, 3),
        ]
    ],
)
def test_seeded_scan_is_the_recurrence_from_the_slots_state(rows, width, heads, head_dim, groups, state_size):
    torch.manual_seed(0)
    x, dt = torch.randn(rows, width, heads, head_dim), torch.randn(rows, width, heads)
    b, c = torch.randn(rows, width, groups, state_size), torch.randn(rows, width, groups, state_size)
    a, skip, dt_bias = -torch.rand(heads) - 0.1, torch.randn(heads), torch.randn(heads)
    cache = torch.randn(5, heads, head_dim, state_size) * 10
    slot = torch.tensor([4, 1][:rows])
    before = cache.clone()
    got = seeded_scan(x, dt, a, b, c, skip, dt_bias, cache, slot)
    expected = step_by_step(x, dt, a, b, c, skip, dt_bias, cache[slot])
    assert float((got - expected).abs().max() / expected.abs().max()) < FP32_OP
    assert torch.equal(cache, before), "the cache is read-only"


@pytest.mark.usefixtures("poisoned_memory")
def test_seeded_scan_survives_large_states_and_steps():
    """States of long contexts reach thousands (spec, known bug 2), and large steps underflow every decay."""
    x, dt = torch.ones(1, 16, 2, 4), torch.full((1, 16, 2), 60.0)
    b = c = torch.ones(1, 16, 1, 8)
    got = seeded_scan(
        x,
        dt,
        torch.tensor([-16.0, -1.0]),
        b,
        c,
        torch.ones(2),
        torch.zeros(2),
        torch.full((1, 2, 4, 8), 1e4),
        torch.tensor([0]),
    )
    assert torch.isfinite(got).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("width", [1, 2, 16, 31])
@pytest.mark.parametrize("use_bias", [True, False])
def test_seeded_conv_continues_the_contexts_inputs(width, use_bias):
    torch.manual_seed(0)
    channels, taps, context = 6, 4, 9
    inputs = torch.randn(2, context + width, channels)
    weight, bias = torch.randn(channels, taps), torch.randn(channels) if use_bias else None
    whole = F.conv1d(F.pad(inputs.transpose(1, 2), (taps - 1, 0)), weight[:, None], bias, groups=channels)
    expected = F.silu(whole).transpose(1, 2)[:, context:]
    got = seeded_conv(inputs[:, context:], weight, bias, inputs[:, context - taps + 1 : context])
    torch.testing.assert_close(got, expected, atol=FP32_OP, rtol=0)


def test_seeded_conv_names_the_wrong_argument():
    with pytest.raises(ValueError, match="history_RKC has 4 inputs per row, a kernel of 4 taps needs 3"):
        seeded_conv(torch.zeros(1, 2, 6), torch.zeros(6, 4), None, torch.zeros(1, 4, 6))
