"""What vLLM's model runner does in Triton kernels around every forward, in plain torch and numpy: for a CPU.

There Triton only interprets, at a millisecond per program: most of an engine step. Each function has the parameters of
the vLLM function it stands in for (named in its docstring) and writes exactly the elements that one writes;
``shims.use_torch_for_runner_kernels`` puts them in place, ``tests/test_runner_kernels.py`` holds them equal to the
kernels.

Legend: R rows of the batch, T scheduled tokens, Q request slots, G cache groups, N rows of logits, V vocabulary.
"""

import ctypes
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PAD_SLOT = -1

DRAWN_ROWS = 64
"""Most rows whose noise exists at once: 0.3 GiB of temporaries at a vocabulary of 131,072."""

_LOW_32 = 0xFFFFFFFF
_BELOW_1 = 1 - 2.0**-24  # the largest uniforms round to 1


def rows_of_tokens(query_start_loc: torch.Tensor, num_reqs: int) -> tuple[np.ndarray, np.ndarray]:
    """The row of each scheduled token, int64 [T], and its offset in that row, int64 [T]."""
    starts = query_start_loc[: num_reqs + 1].numpy()
    row = np.arange(num_reqs).repeat(np.diff(starts))
    return row, np.arange(len(row)) - starts[row]


def prepare_prefill_inputs(
    input_ids: torch.Tensor,
    next_prefill_tokens: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    all_token_ids: torch.Tensor,
    prefill_len: torch.Tensor,
    num_computed_tokens: torch.Tensor,
) -> None:
    """Tokens of rows in prefill into ``input_ids`` (``input_batch.prepare_prefill_inputs``)."""
    num_lookahead = next_prefill_tokens.shape[0]
    computed, known = num_computed_tokens[idx_mapping], prefill_len[idx_mapping]
    for row in (computed < known).nonzero().flatten().tolist():
        slot, begin = int(idx_mapping[row]), int(computed[row])
        start, stop = query_start_loc[row : row + 2].tolist()
        end = begin + stop - start
        input_ids[start:stop] = all_token_ids[slot, begin:end]
        ahead = all_token_ids[slot, end : min(end + num_lookahead, int(known[row]))]
        next_prefill_tokens[:, slot] = 0
        next_prefill_tokens[: ahead.numel(), slot] = ahead


def prepare_pos_seq_lens(
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    pos: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Positions of tokens and lengths of sequences (``input_batch.prepare_pos_seq_lens``)."""
    num_reqs = idx_mapping.shape[0]
    computed = num_computed_tokens.numpy()[idx_mapping.numpy()]
    row, offset = rows_of_tokens(query_start_loc, num_reqs)
    pos.numpy()[: len(row)] = computed[row] + offset
    lengths = seq_lens.numpy()
    lengths[:num_reqs] = computed + np.diff(query_start_loc[: num_reqs + 1].numpy())
    lengths[num_reqs:] = 0


def combine_sampled_and_draft_tokens(
    input_ids: torch.Tensor,
    idx_mapping: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    prefill_len: torch.Tensor,
    draft_tokens: torch.Tensor,
    cu_num_logits: torch.Tensor,
    num_logits: int,
    num_new_sampled_tokens: int = 1,
) -> torch.Tensor:
    """Where logits are wanted, int64 [num_logits]; the last sampled token and the drafts of decoding rows into
    ``input_ids`` (``input_batch.combine_sampled_and_draft_tokens``).
    """
    num_reqs, slot = idx_mapping.shape[0], idx_mapping.numpy()
    row, offset = rows_of_tokens(cu_num_logits, num_reqs)
    wanted, start = np.diff(cu_num_logits[: num_reqs + 1].numpy()), query_start_loc.numpy()
    first = start[1 : num_reqs + 1] - wanted
    logits_indices = torch.empty(num_logits, dtype=torch.int64)
    logits_indices.numpy()[: len(row)] = first[row] + offset
    length, known = seq_lens[:num_reqs].numpy(), prefill_len.numpy()[slot]
    if num_new_sampled_tokens:
        decoding = (length > known) & (length - wanted >= known)
        input_ids.numpy()[first[decoding]] = last_sampled_tokens.view(-1).numpy()[slot[decoding]]
    drafts = wanted - num_new_sampled_tokens
    for index in np.flatnonzero((length > known) & (drafts > 0)):
        end, count = start[index + 1], drafts[index]
        input_ids[end - count : end] = draft_tokens[slot[index], :count]
    return logits_indices


def post_update(
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    output_bin_counts: torch.Tensor | None,
    sampled_tokens: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
    draft_tokens: torch.Tensor | None = None,
    draft_tokens_out: torch.Tensor | None = None,
) -> None:
    """Sampled tokens into the requests' states, and from 0.33 on a drafter's (``input_batch.post_update``)."""
    real = np.flatnonzero(idx_mapping.numpy() >= 0)
    slot = idx_mapping.numpy()[real]
    if draft_tokens is not None:
        assert draft_tokens_out is not None
        draft_tokens_out.numpy()[slot] = draft_tokens.numpy()[real]
    advance = -num_rejected.numpy()[real]
    if query_start_loc is not None:
        advance = advance + np.diff(query_start_loc[: idx_mapping.shape[0] + 1].numpy())[real]
    num_computed_tokens.numpy()[slot] += advance
    count, sampled = num_sampled.numpy()[real], sampled_tokens.numpy()
    writing = count > 0
    if not writing.any():
        return
    last_sampled_tokens.view(-1).numpy()[slot[writing]] = sampled[real[writing], count[writing] - 1]
    row, column = (np.arange(sampled.shape[1]) < count[:, None]).nonzero()
    token, owner = sampled[real[row], column], slot[row]
    all_token_ids.numpy()[owner, total_len.numpy()[owner] + column] = token
    if output_bin_counts is not None:
        np.add.at(output_bin_counts.numpy(), (owner, token), 1)
    total_len.numpy()[slot] += count


def gather_block_tables(
    self: Any,
    idx_mapping: torch.Tensor,
    num_reqs_padded: int,
    out: tuple[torch.Tensor, ...] | None = None,
    out_ptrs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The batch's block tables, int32 [num_reqs_padded, blocks] a group (``BlockTables.gather_block_tables``)."""
    tables = tuple(self.input_block_tables) if out is None else out
    num_reqs, slot = idx_mapping.shape[0], idx_mapping.numpy()
    for table, source, num_blocks in zip(tables, self.block_tables, self.num_blocks.gpu.numpy(), strict=True):
        used, target = num_blocks[slot], table.numpy()
        for row in range(num_reqs):
            target[row, : used[row]] = source.gpu.numpy()[slot[row], : used[row]]
        target[num_reqs:num_reqs_padded] = 0
    return tuple(table[:num_reqs_padded] for table in tables)


def compute_slot_mappings(
    self: Any,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    num_tokens_padded: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cache slots of the scheduled tokens, int64 [G, num_tokens_padded] (``BlockTables.compute_slot_mappings``).

    Context parallelism, which our architecture refuses, is not implemented.
    """
    assert self.cp_size == 1, self.cp_size
    slots = self.slot_mappings if out is None else out
    row, _ = rows_of_tokens(query_start_loc, idx_mapping.shape[0])
    num_tokens, written = len(row), slots.numpy()
    request, position = idx_mapping.numpy()[row], positions.numpy()[: len(row)]
    written[:, num_tokens:] = PAD_SLOT
    for group, (table, size) in enumerate(zip(self.block_tables, self.block_sizes, strict=True)):
        if not self._slot_mapping_enabled[group]:
            written[group, :num_tokens] = PAD_SLOT
            continue
        block = table.gpu.numpy()[request.clip(min=0), position // size].astype(np.int64)
        written[group, :num_tokens] = np.where(request < 0, PAD_SLOT, block * size + position % size)
    return slots[:, :num_tokens_padded]


def zero_block_ids(self: Any, block_ids: list[int]) -> None:
    """Zero cache blocks (``KVBlockZeroer.zero_block_ids``); addresses and strides count 4-byte words."""
    if not block_ids or self._meta is None:
        return
    addresses, strides, sizes = (tensor.tolist() for tensor in self._meta[:3])
    for address, stride, size in zip(addresses, strides, sizes, strict=True):
        for block in block_ids:
            ctypes.memset(address + block * stride * 4, 0, size * 4)


def apply_write(self: Any) -> None:
    """What was staged for one tensor, into it (``StagedWriteTensor.apply_write``)."""
    flat, stride, begin = self.gpu.view(-1), self.gpu.stride(0), 0
    staged = zip(self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens, strict=True)
    for index, start, end in staged:
        values = torch.tensor(self._staged_write_contents[begin:end], dtype=self.gpu.dtype)
        flat[index * stride + start : index * stride + start + values.numel()] = values
        begin = end
    self.clear_staged_writes()


def apply_all_writes(self: Any, tensors: Any, output_ptrs: torch.Tensor, output_strides: torch.Tensor) -> None:
    """What was staged for several tensors, into them (``FusedStagedWriter.apply``)."""
    for tensor in tensors:
        apply_write(tensor)


def apply_temperature(logits: torch.Tensor, expanded_idx_mapping: torch.Tensor, temperature: torch.Tensor) -> None:
    """Divide logits [N, V] in place by each row's temperature, greedy rows not (``gumbel.apply_temperature``)."""
    divisor = temperature[expanded_idx_mapping].float()
    logits /= divisor.where(divisor != 0, 1.0)[:, None]


def gumbel_sample(
    logits: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    pos: torch.Tensor,
    apply_temperature: bool,
    is_drafting: bool = False,
    use_fp64: bool = False,
) -> torch.Tensor:
    """Tokens int64 [N]: the likeliest, or the Gumbel maximum where the row has a temperature (``gumbel.gumbel_sample``;
    vLLM draws drafts and 64-bit noise for nobody here)."""
    assert not apply_temperature
    assert not is_drafting
    assert not use_fp64
    logits = logits.float()
    token_N = logits.max(dim=-1).indices
    for rows in temperature[expanded_idx_mapping].nonzero().squeeze(1).split(DRAWN_ROWS):
        noise_NV = gumbel_noise(seed[expanded_idx_mapping[rows]], pos[rows], logits.shape[1])
        token_N[rows] = (logits[rows] + noise_NV).max(dim=-1).indices
    return token_N


def gumbel_noise(seed_N: torch.Tensor, pos_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """vLLM's noise for a seed, int64 [N], and a position, int64 [N]; float32 [N, V].

    -log(-log(1 - u)), where u is the MurmurHash3 of seed, position and token (``gumbel.murmur3_uniform32``).
    """
    hash_N = torch.zeros_like(seed_N)
    for word in (seed_N & _LOW_32, seed_N >> 32 & _LOW_32, pos_N.long() & _LOW_32):
        hash_N = _mix(hash_N, word)
    bits_NV = _finish(_mix(hash_N[:, None], torch.arange(vocab_size, device=seed_N.device)))
    uniform_NV = (bits_NV >> 16).float() * 2.0**-16 + ((bits_NV & 0xFFFF).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform_NV.clamp(max=_BELOW_1)))


def _mix(hash_: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """One round of MurmurHash3 (x86, 32 bits), in int64."""
    word = word * 0xCC9E2D51 & _LOW_32
    word = _rotate(word, 15) * 0x1B873593 & _LOW_32
    return _rotate(hash_ ^ word, 13) * 5 + 0xE6546B64 & _LOW_32


def _rotate(word: torch.Tensor, by: int) -> torch.Tensor:
    return (word << by | word >> 32 - by) & _LOW_32


def _finish(hash_: torch.Tensor) -> torch.Tensor:
    """Its last rounds, after 16 bytes."""
    hash_ = hash_ ^ 16
    hash_ = (hash_ ^ hash_ >> 16) * 0x85EBCA6B & _LOW_32
    hash_ = (hash_ ^ hash_ >> 13) * 0xC2B2AE35 & _LOW_32
    return hash_ ^ hash_ >> 16


def apply_top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Logits [N, V] without what is outside each row's top k and top p (``topk_topp_sampler.apply_top_k_top_p``)."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    return logits if k is None and p is None else apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)


def apply_penalties(
    logits: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    token_ids: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    repetition_penalty: torch.Tensor,
    frequency_penalty: torch.Tensor,
    presence_penalty: torch.Tensor,
    prompt_bin_mask: torch.Tensor,
    output_bin_counts: torch.Tensor,
) -> None:
    """Penalise tokens of prompt, output and drafts to the left in logits [N, V], in place (``penalties``)."""
    slot_N = expanded_idx_mapping.long()
    repetition, frequency, presence = (p[slot_N] for p in (repetition_penalty, frequency_penalty, presence_penalty))
    bit_32 = torch.arange(32, dtype=torch.int32)
    for row in ((repetition != 1) | (frequency != 0) | (presence != 0)).nonzero().squeeze(1).tolist():
        count_V = output_bin_counts[slot_N[row]].clone()
        left = token_ids[row - int(expanded_local_pos[row]) + 1 : row + 1].long()
        count_V.index_add_(0, left, torch.ones_like(left, dtype=count_V.dtype))
        x_V = logits[row].float()
        in_prompt_V = (prompt_bin_mask[slot_N[row], :, None] >> bit_32 & 1).bool().flatten()[: len(x_V)]
        scale_V = torch.where(in_prompt_V | (count_V > 0), repetition[row], 1.0)
        x_V = x_V * torch.where(x_V > 0, 1.0 / scale_V, scale_V)
        logits[row] = x_V - frequency[row] * count_V - presence[row] * (count_V > 0)


def count_tokens(
    expanded_idx_mapping: torch.Tensor,
    all_token_ids: torch.Tensor,
    prompt_len: torch.Tensor,
    prefill_len: torch.Tensor,
    prompt_bin_mask: torch.Tensor,
    output_bin_counts: torch.Tensor,
    max_prefill_len: int,
) -> None:
    """Which tokens the prompts of some slots have, a bit each, and how often their outputs (``penalties.bincount``)."""
    vocab_size = output_bin_counts.shape[1]
    for slot in expanded_idx_mapping.tolist():
        end_of_prompt, end = int(prompt_len[slot]), int(prefill_len[slot])
        is_there = torch.zeros(32 * prompt_bin_mask.shape[1], dtype=torch.int64)
        is_there[all_token_ids[slot, :end_of_prompt].long()] = 1
        prompt_bin_mask[slot] = (is_there.view(-1, 32) << torch.arange(32)).sum(dim=1).to(torch.int32)
        outputs = all_token_ids[slot, end_of_prompt:end].long()
        output_bin_counts[slot] = torch.bincount(outputs, minlength=vocab_size).to(output_bin_counts.dtype)


def get_num_sampled_and_rejected(
    num_sampled: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    prefill_len: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows still in prefill have sampled nothing (``input_batch.get_num_sampled_and_rejected``)."""
    num_reqs = idx_mapping.shape[0]
    in_prefill = seq_lens[:num_reqs] < prefill_len[idx_mapping]
    num_sampled[:num_reqs].masked_fill_(in_prefill, 0)
    rejected = cu_num_logits[: num_reqs + 1].diff() - num_sampled[:num_reqs]
    num_rejected = torch.empty_like(num_sampled)
    num_rejected[:num_reqs] = rejected.masked_fill(in_prefill, 0)
    return num_sampled, num_rejected


def without_later_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called without those keywords that it does not have: a later vLLM passes more of them."""
    parameters = inspect.signature(function).parameters
    return lambda *args, **kwargs: function(*args, **{k: v for k, v in kwargs.items() if k in parameters})


class Launcher:
    """Stands in for a Triton kernel: ``Launcher(function)[grid](...)`` calls the function, whatever the grid."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = without_later_keywords(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.function


def advance_mamba_blocks(
    idx_mapping: torch.Tensor,
    state_idx: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_accepted_tokens: torch.Tensor,
    src_col: torch.Tensor,
    src_off: torch.Tensor,
    num_reqs: int,
    BLOCK_SIZE: int,
    MAMBA_BLOCK_SIZE: int,
) -> None:
    """Where each row's state is and goes (``mamba_utils.preprocess_mamba_align_fused_kernel``)."""
    slot = idx_mapping[:num_reqs].long()
    before = state_idx[slot]
    src_col[slot] = before
    src_off[slot] = (num_accepted_tokens[slot] - 1).clamp(min=0).to(src_off.dtype)
    end = num_computed_tokens[slot] + query_start_loc[: num_reqs + 1].diff()
    after = ((end + MAMBA_BLOCK_SIZE - 1) // MAMBA_BLOCK_SIZE - 1).to(state_idx.dtype)
    state_idx[slot] = after
    num_accepted_tokens[slot[(before >= 0) & (before != after)]] = 1


def scatter_num_accepted(idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_accepted: torch.Tensor) -> None:
    """Accepted tokens of each real row, at least one (``mamba_hybrid._scatter_num_accepted_kernel``)."""
    real = idx_mapping >= 0
    accepted = num_sampled[: len(idx_mapping)][real].clamp(min=1)
    num_accepted[idx_mapping[real].long()] = accepted.to(num_accepted.dtype)


def select_real_slots(idx_mapping: torch.Tensor) -> torch.Tensor:
    """int64, the request slots of those rows that have one."""
    return idx_mapping[idx_mapping >= 0].long()


def copy_states_before_step(
    self: Any,
    num_reqs: int,
    state_idx_gpu: torch.Tensor,
    src_col_gpu: torch.Tensor,
    token_bias_gpu: torch.Tensor,
    idx_mapping: torch.Tensor,
) -> None:
    """A row that begins a block takes its Mamba states along (``MambaSpecDecodeGPUContext.run_fused_precopy``).

    Args:
        self: a ``MambaSpecDecodeGPUContext`` with convolution states that have their tokens first, as on a CPU.
        num_reqs: rows.
        state_idx_gpu, src_col_gpu: int32 [request slots], columns of the block table, to and from; -1: none.
        token_bias_gpu: 0, since a step keeps one token or all of a row's.
        idx_mapping: int32 [rows], request slots; -1: none.

    """
    if not self.is_initialized:
        return
    slots = select_real_slots(idx_mapping[:num_reqs])
    slots = slots[(src_col_gpu[slots] >= 0) & (src_col_gpu[slots] != state_idx_gpu[slots])]
    assert not token_bias_gpu[slots].any(), "more than one accepted token"
    rows = list(zip(*(values.tolist() for values in (slots, src_col_gpu[slots], state_idx_gpu[slots])), strict=True))
    states = zip(
        self.state_base_addrs.tolist(),
        self.state_block_strides.tolist(),
        (self.state_elem_sizes * self.state_inner_sizes * self.state_conv_widths.clamp(min=1)).tolist(),
        self.block_table_ptrs[self.state_group_indices.long()].tolist(),
        strict=True,
    )
    for address, block_bytes, state_bytes, table in states:
        for slot, *columns in rows:
            row = table + slot * 4 * self.block_table_stride_req
            source, target = (address + block_bytes * ctypes.c_int32.from_address(row + 4 * c).value for c in columns)
            ctypes.memmove(target, source, state_bytes)


def keep_states_after_step(
    self: Any, num_reqs: int, num_accepted: Any, state_idx: Any, num_computed: Any, idx_mapping: Any
) -> None:
    """Nothing moves when a step has kept one token or all of a row's: its states are where they belong
    (``MambaSpecDecodeGPUContext.run_fused_postprocess_align``)."""
    slots = select_real_slots(idx_mapping[:num_reqs])
    assert (num_accepted[slots] == 1).all(), "more than one accepted token"
