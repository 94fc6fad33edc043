"""The noise generator against published vectors, and its statistics."""

import pytest
import torch

from vllm_twotower.decoding.noise import gumbel_from_bits, gumbel_noise, philox_4x32


def signed(words):
    """Two 32-bit key words as one signed 64-bit seed."""
    value = words[0] | words[1] << 32
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known-answer vectors for philox4x32-10, first word
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ],
)
def test_known_answers(counter, key, expected):
    words = tuple(torch.tensor([w]) for w in counter)
    assert philox_4x32(torch.tensor([signed(key)]), words).tolist() == [expected]


def test_noise_is_gumbel_and_depends_on_every_part_of_its_key():
    key = [torch.tensor([v]) for v in (5, 100, 2)]
    noise = gumbel_noise(*key, 200_000)
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.05)
    for part in range(3):
        other = [k + (1 if i == part else 0) for i, k in enumerate(key)]
        assert not torch.equal(gumbel_noise(*other, 8), noise[:, :8])
    assert torch.equal(gumbel_noise(*key, 8), noise[:, :8])


def test_noise_is_finite_for_every_random_word():
    """One infinity in 2**24 draws would choose the token of 1 in 128 random proposals over 131,072 tokens."""
    noise = gumbel_from_bits(torch.tensor([0, 2**32 - 1, 2**32 - 2**8, 2**32 - 2**9, 2**31]))
    assert torch.isfinite(noise).all()
    assert -3 < float(noise.min()) < float(noise.max()) < 17
