"""Counter-based Gumbel noise: a pure function of (request seed, position, pass, vocabulary index).

A proposal's noise must not depend on who shares the batch, on the device, or on how often a request was preempted, so
it comes from no generator with state. Philox-4x32-10 (Salmon et al., SC'11) is the generator that Triton and cuRAND
offer too; a kernel that draws ``philox(seed, vocab_index, position, pass, 0)`` reproduces these numbers.
"""

import torch

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def _multiply_high_low(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # int64 wraps modulo 2**64, and an arithmetic shift followed by the mask gives the unsigned high word all the same
    product = b * a
    return (product >> 32) & _LOW_32, product & _LOW_32


def philox_4x32(
    seed: torch.Tensor, counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """First output word of Philox-4x32-10.

    Args:
        seed: int64, broadcastable to the counters; its low and high 32 bits are the key.
        counter: four int64 tensors with values in [0, 2**32), broadcastable to each other.

    Returns:
        int64 tensor of the broadcast shape, values in [0, 2**32).

    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW_32, (k1 + _KEY_INCREMENTS[1]) & _LOW_32
    return c0


def gumbel_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from random words, -log(-log u): finite for each of them.

    Args:
        bits: int64 of any shape, values in [0, 2**32).

    Returns:
        float32 of that shape.

    """
    # 23 bits and half a step are exact in fp32 and strictly inside (0, 1), so both logarithms are finite; with 24 bits
    # the highest value rounds to 1, and its infinite noise would choose a token whatever the logits say
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def gumbel_noise(
    seed_N: torch.Tensor, position_N: torch.Tensor, pass_index_N: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Standard Gumbel noise for N rows.

    Args:
        seed_N: int64 [N], the request's seed.
        position_N: int64 [N], the token's absolute position in its sequence.
        pass_index_N: int64 [N], the denoise pass within the canvas, from 0.
        vocab_size: V.

    Returns:
        float32 [N, V] on the device of ``seed_N``.

    """
    vocab_V = torch.arange(vocab_size, device=seed_N.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed_N.device)
    bits_NV = philox_4x32(seed_N[:, None], (vocab_V[None], position_N[:, None], pass_index_N[:, None], zero))
    return gumbel_from_bits(bits_NV)
