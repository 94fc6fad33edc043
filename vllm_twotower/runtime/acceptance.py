"""What a verification says: how many drafts are kept, and which of the others are hints for the next draft.

Legend: R rows of a step, F rows that verify, S widest canvas, N rows of logits in batch order.
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
    column_S = torch.arange(verify.draft_FS.shape[1] + 1, device=device)
    index_RS = (start_R[:, None] + column_S).clamp(max=output.sampled_token_ids.shape[0] - 1)
    chosen_RS = output.sampled_token_ids[:, 0][index_RS]
    row_F = verify.row_F
    is_draft_FS = column_S[1:] < verify.width_F[:, None]
    is_right_FS = (chosen_RS[row_F, :-1] == verify.draft_FS) & is_draft_FS
    num_accepted_F = is_right_FS.cumprod(dim=1).sum(dim=1)
    num_sampled, num_rejected = output.num_sampled.clone(), torch.zeros_like(output.num_rejected)
    num_sampled[row_F] = (num_accepted_F + 1).to(num_sampled.dtype)
    num_rejected[row_F] = (verify.width_F - num_accepted_F - 1).to(num_rejected.dtype)
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
        int64 [F, S], by position in the row's next canvas.

    """
    draft_FS, row_F = verify.draft_FS, verify.row_F
    column_S = torch.arange(draft_FS.shape[1] + 1, device=draft_FS.device)
    chosen_FS = accepted.sampled_token_ids[row_F, :-1]
    next_F = accepted.num_sampled[row_F].long()[:, None]  # where the next canvas begins in this one
    is_behind_FS = (column_S[1:] > next_F) & (column_S[1:] < verify.width_F[:, None])
    # a token that has more than half of the probability is the likeliest
    index_N = (batch.cu_num_logits[row_F].long()[:, None] + column_S[:-1]).clamp(max=len(logits_NV) - 1).flatten()
    best = [canvas_sample(logits_NV[tile], mask_token_id) for tile in index_N.split(LOGITS_TILE)]
    token_FS = torch.cat([one.token_N for one in best]).view_as(draft_FS)
    is_sure_FS = (torch.cat([one.confidence_N for one in best]) > HINT_THRESHOLD).view_as(draft_FS)
    is_hint_FS = is_behind_FS & is_sure_FS & (draft_FS == token_FS) & (draft_FS == chosen_FS)
    none_F1 = torch.full_like(draft_FS[:, :1], mask_token_id)
    canvas_FS = torch.cat([none_F1, torch.where(is_hint_FS, draft_FS, mask_token_id), none_F1], dim=1)
    return canvas_FS.gather(1, (column_S + next_F).clamp(max=canvas_FS.shape[1] - 1))
