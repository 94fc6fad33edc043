"""The ops beside flashinfer's kernels for the same thing: its norm, and its sampling.

    pip install flashinfer-python
    TRITON_INTERPRET=0 python -m pytest tests/test_op_gpu_parity.py

Only where there is a GPU and the package is installed; skipped elsewhere. NEVER RUN YET: what these calls take and
return is from the package's documentation.
"""

import pytest
import torch

from tests.op_forms import NATIVE
from tests.test_op_canvas_sample import logits
from tests.test_op_seeded_scan import difference
from tests.tolerances import BF16_OP
from vllm_twotower.ops.adaln import kernel as adaln
from vllm_twotower.ops.adaln.reference import UNMODULATED, Modulation
from vllm_twotower.ops.canvas_sample import kernel as canvas_sample

pytestmark = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device and TRITON_INTERPRET=0")
MASK = 3


@pytest.mark.parametrize("vocab", [512, 131_072])
def test_greedy_proposals_and_confidences_are_flashinfers(vocab):
    """Its softmax gives the confidences, its top-1 sampling the proposals; the mask id is taken out for it."""
    sampling = pytest.importorskip("flashinfer.sampling", reason="flashinfer is not installed")
    x = logits(32, vocab).cuda()
    x[:, MASK] = float("-inf")
    probability = sampling.softmax(x)
    token = sampling.top_k_sampling_from_probs(probability, 1).long()
    got = canvas_sample.canvas_sample(x.clone(), MASK)
    assert torch.equal(got.token_N, token)
    expected = probability.gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(got.confidence_N, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["norm_modulate", "modulate_norm"])
def test_an_unmodulated_norm_is_flashinfers(name, dtype):
    norm = pytest.importorskip("flashinfer.norm", reason="flashinfer is not installed")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator).to("cuda", dtype) for size in ((48, 2688), (2688,)))
    vector, table = (torch.randn(*size, generator=generator).to("cuda", dtype) for size in ((17, 3, 2688), (3, 2688)))
    row = torch.arange(48, device="cuda") // 16
    modulation = Modulation(vector, table, torch.full((3,), UNMODULATED, device="cuda"), row)
    got = getattr(adaln, name)(x, weight, 1e-5, modulation)
    assert difference(got, norm.rmsnorm(x, weight, eps=1e-5)) < BF16_OP
