"""What a verification says: how many drafts are kept, and which of the others are hints for the next draft.

Legend: R rows of a step, V rows that verify, S widest canvas, N rows of logits in batch order.
"""

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_twotower.decoding.drafts import HINT_THRESHOLD
from vllm_twotower.models.denoiser_tower import LOGITS_TILE
from vllm_twotower.ops import canvas_sample
from vllm_twotower.runtime.step import VerifyRows


def accept_drafts(output: SamplerOutput, verify: VerifyRows, batch: InputBatch) -> SamplerOutput:
    """Of what vLLM's sampler chose all along a verified row: as far as the drafts are the same, and one more.

    Args:
        output: with one row per position of every request, in batch order.
        verify: the rows that verify drafts.
        batch: vLLM's, with ``cu_num_logits`` of those rows.

    Returns:
        One row per request: tokens int64 [R, S], counts int32 [R].

    """
    device, num_reqs = output.sampled_token_ids.device, batch.num_reqs
    start_R = batch.cu_num_logits[:num_reqs].long()
    num_logits_R = batch.cu_num_logits[: num_reqs + 1].diff().long()
    column_S = torch.arange(verify.draft_VS.shape[1] + 1, device=device)
    index_RS = (start_R[:, None] + column_S).clamp(max=output.sampled_token_ids.shape[0] - 1)
    chosen_RS = output.sampled_token_ids[:, 0][index_RS]
    row_V = verify.row_V
    is_draft_VS = column_S[1:] < verify.width_V[:, None]
    is_right_VS = (chosen_RS[row_V, :-1] == verify.draft_VS) & is_draft_VS
    num_accepted_V = is_right_VS.cumprod(dim=1).sum(dim=1)
    num_sampled, num_rejected = output.num_sampled.clone(), torch.zeros_like(output.num_rejected)
    num_sampled[row_V] = (num_accepted_V + 1).to(num_sampled.dtype)
    num_rejected[row_V] = (verify.width_V - num_accepted_V - 1).to(num_rejected.dtype)
    assert output.num_nans is not None
    row_N = torch.arange(num_reqs, device=device).repeat_interleave(num_logits_R, output_size=len(output.num_nans))
    num_nans = torch.zeros(num_reqs, dtype=torch.int32, device=device).index_add_(0, row_N, output.num_nans)
    return SamplerOutput(chosen_RS, output.logprobs_tensors, num_nans, num_sampled, num_rejected)


def find_hints(
    logits_NV: torch.Tensor, accepted: SamplerOutput, verify: VerifyRows, batch: InputBatch, mask_token_id: int
) -> torch.Tensor:
    """Drafts behind a rejected one that AR, although it saw that one, chose too and was sure of.

    Args:
        logits_NV: the context tower's, [N, V], any float dtype.
        accepted: of ``accept_drafts``.
        verify: the rows that verify drafts.
        batch: as for ``accept_drafts``.
        mask_token_id: stands where there is no hint.

    Returns:
        int64 [V, S], by position in the row's next canvas.

    """
    draft_VS, row_V = verify.draft_VS, verify.row_V
    column_S = torch.arange(draft_VS.shape[1] + 1, device=draft_VS.device)
    chosen_VS = accepted.sampled_token_ids[row_V, :-1]
    next_V = accepted.num_sampled[row_V].long()[:, None]  # where the next canvas begins in this one
    is_behind_VS = (column_S[1:] > next_V) & (column_S[1:] < verify.width_V[:, None])
    # a token that has more than half of the probability is the likeliest
    index_N = (batch.cu_num_logits[row_V].long()[:, None] + column_S[:-1]).clamp(max=len(logits_NV) - 1).flatten()
    best = [canvas_sample(logits_NV[tile], mask_token_id) for tile in index_N.split(LOGITS_TILE)]
    token_VS = torch.cat([one.token_N for one in best]).view_as(draft_VS)
    is_sure_VS = (torch.cat([one.confidence_N for one in best]) > HINT_THRESHOLD).view_as(draft_VS)
    is_hint_VS = is_behind_VS & is_sure_VS & (draft_VS == token_VS) & (draft_VS == chosen_VS)
    none_V1 = torch.full_like(draft_VS[:, :1], mask_token_id)
    canvas_VS = torch.cat([none_V1, torch.where(is_hint_VS, draft_VS, mask_token_id), none_V1], dim=1)
    return canvas_VS.gather(1, (column_S + next_V).clamp(max=canvas_VS.shape[1] - 1))
