"""The ops beside other people's kernels for the same thing: mamba-ssm's chunk scan, flashinfer's norm and sampling.

    pip install mamba-ssm flashinfer-python
    TRITON_INTERPRET=0 python -m pytest tests/test_op_gpu_parity.py

Only where there is a GPU and the package is installed; skipped elsewhere. NEVER RUN YET: what these calls take and
return is from the packages' documentation.
"""

import pytest
import torch

from tests.op_forms import NATIVE
from tests.test_op_canvas_sample import logits
from tests.test_op_seeded_scan import difference, scan_arguments
from tests.tolerances import BF16_OP
from vllm_twotower.ops.adaln import kernel as adaln
from vllm_twotower.ops.adaln.reference import UNMODULATED, Modulation
from vllm_twotower.ops.canvas_sample import kernel as canvas_sample
from vllm_twotower.ops.seeded_scan import kernel as seeded_scan
from vllm_twotower.ops.seeded_scan.reference import ScanInputs

pytestmark = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device and TRITON_INTERPRET=0")
REAL_LAYER = {"heads": 64, "head_dim": 64, "groups": 8, "state_size": 128}
MASK = 3


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scan_is_mamba_ssms_from_initial_states(dtype, width):
    """To bf16's tolerance in fp32 as well: mamba-ssm's products there are TF32."""
    ssd = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", reason="mamba-ssm is not installed")
    case = {name: t.cuda() for name, t in scan_arguments(3, width, **REAL_LAYER, dtype=dtype).items()}
    expected = ssd.mamba_chunk_scan_combined(
        case["x_RSHP"],
        case["dt_RSH"],
        case["a_H"],
        case["b_RSGN"],
        case["c_RSGN"],
        chunk_size=64,
        D=case["skip_H"],
        dt_bias=case["dt_bias_H"],
        initial_states=case["state_ZHPN"][case["slot_R"]],
        dt_softplus=True,
    )
    assert difference(seeded_scan.seeded_scan(ScanInputs(**case)), expected) < BF16_OP


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
