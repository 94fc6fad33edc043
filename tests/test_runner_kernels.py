"""The plain-torch stand-ins for the runner's kernels write what vLLM's kernels write, element for element."""

import ast
import inspect
import pathlib
import types

import pytest
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401 - what a CPU worker does to torch and to the runner's buffers
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.worker import mamba_utils
from vllm.v1.worker.gpu import input_batch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.model_states import mamba_hybrid
from vllm.v1.worker.gpu.sample import gumbel, penalties
from vllm.v1.worker.utils import KVBlockZeroer

from vllm_twotower.cpu import runner_kernels as plain
from vllm_twotower.cpu import shims

SLOTS, MODEL_LEN, VOCAB = 6, 40, 11
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=12, deadline=None)


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


class Batch:
    """A random batch: some rows in prefill, some decoding, tokens of every row one after the other."""

    def __init__(self, seed: int) -> None:
        self.generator = generator = torch.Generator().manual_seed(seed)
        self.num_reqs = int(integers(generator, 1, SLOTS + 1, 1))
        self.idx_mapping = torch.randperm(SLOTS, generator=generator)[: self.num_reqs].to(torch.int32)
        lengths = integers(generator, 1, 9, self.num_reqs)
        self.query_start_loc = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
        self.num_tokens = int(self.query_start_loc[-1])
        self.num_computed = integers(generator, 0, 20, SLOTS)
        self.prefill_len = self.num_computed + integers(generator, -4, 12, SLOTS).clamp(min=0)
        self.all_token_ids = integers(generator, 0, VOCAB, SLOTS, MODEL_LEN)
        self.seq_lens = torch.zeros(SLOTS, dtype=torch.int32)
        self.seq_lens[: self.num_reqs] = self.num_computed[self.idx_mapping] + lengths


def run_both(kernel, ours, make_arguments, *outputs: str):
    """Both on equal copies of the arguments; the named ones must be equal afterwards, and so must the results."""
    results = []
    for function in (kernel, ours):
        arguments = make_arguments()
        results.append((function(**arguments), {name: arguments[name] for name in outputs}))
    (expected, written), (got, ours_written) = results
    for name in outputs:
        assert torch.equal(written[name], ours_written[name]), name
    if expected is not None:
        assert torch.equal(expected, got)


@few
@given(seeds)
def test_prefill_inputs(seed):
    b = Batch(seed)

    def arguments():
        return {
            "input_ids": torch.full((64,), -7, dtype=torch.int32),
            "next_prefill_tokens": torch.full((2, SLOTS), -7, dtype=torch.int32),
            "idx_mapping": b.idx_mapping,
            "query_start_loc": b.query_start_loc,
            "all_token_ids": b.all_token_ids,
            "prefill_len": b.prefill_len,
            "num_computed_tokens": b.num_computed,
        }

    run_both(
        input_batch.prepare_prefill_inputs, plain.prepare_prefill_inputs, arguments, "input_ids", "next_prefill_tokens"
    )


@few
@given(seeds)
def test_positions_and_lengths(seed):
    b = Batch(seed)

    def arguments():
        return {
            "idx_mapping": b.idx_mapping,
            "query_start_loc": b.query_start_loc,
            "num_computed_tokens": b.num_computed,
            "pos": torch.full((64,), -7),
            "seq_lens": torch.full((SLOTS,), -7, dtype=torch.int32),
        }

    run_both(input_batch.prepare_pos_seq_lens, plain.prepare_pos_seq_lens, arguments, "pos", "seq_lens")


@few
@given(seeds, st.sampled_from([0, 1]))
def test_sampled_and_draft_tokens(seed, new):
    b = Batch(seed)
    lengths = b.query_start_loc.diff()
    drafts = torch.minimum(integers(b.generator, 0, 4, b.num_reqs), lengths - new)
    cu_num_logits = torch.cat([torch.zeros(1), (drafts + new).cumsum(0)]).to(torch.int32)

    def arguments():
        return {
            "input_ids": torch.full((64,), -7, dtype=torch.int32),
            "idx_mapping": b.idx_mapping,
            "last_sampled_tokens": torch.arange(100, 100 + SLOTS)[:, None],
            "query_start_loc": b.query_start_loc,
            "seq_lens": b.seq_lens,
            "prefill_len": b.prefill_len,
            "draft_tokens": torch.arange(200, 200 + SLOTS * 4).reshape(SLOTS, 4),
            "cu_num_logits": cu_num_logits,
            "num_logits": int(cu_num_logits[-1]),
            "num_new_sampled_tokens": new,
        }

    run_both(
        input_batch.combine_sampled_and_draft_tokens, plain.combine_sampled_and_draft_tokens, arguments, "input_ids"
    )


@few
@given(seeds, st.booleans(), st.booleans())
def test_update_after_sampling(seed, counting, located):
    b = Batch(seed)
    rows = b.idx_mapping.clone()
    rows[integers(b.generator, 0, 4, b.num_reqs) == 0] = -1
    width = 5
    sampled = integers(b.generator, 0, VOCAB, b.num_reqs, width).long()
    num_sampled = integers(b.generator, 0, width + 1, b.num_reqs)
    num_rejected = integers(b.generator, 0, 3, b.num_reqs)

    def arguments():
        return {
            "idx_mapping": rows,
            "num_computed_tokens": b.num_computed.clone(),
            "last_sampled_tokens": torch.full((SLOTS, 1), -7),
            "output_bin_counts": torch.zeros(SLOTS, VOCAB, dtype=torch.int32) if counting else None,
            "sampled_tokens": sampled,
            "num_sampled": num_sampled,
            "num_rejected": num_rejected,
            "query_start_loc": b.query_start_loc if located else None,
            "all_token_ids": b.all_token_ids.clone(),
            "total_len": b.num_computed + 3,
        }

    written = ["num_computed_tokens", "last_sampled_tokens", "all_token_ids", "total_len"]
    run_both(input_batch.post_update, plain.post_update, arguments, *written, *["output_bin_counts"] * counting)


@few
@given(seeds)
def test_what_was_sampled(seed):
    b = Batch(seed)
    cu_num_logits = torch.arange(b.num_reqs + 1, dtype=torch.int32)

    def arguments():
        return {
            "num_sampled": torch.ones(b.num_reqs, dtype=torch.int32),
            "seq_lens": b.seq_lens,
            "cu_num_logits": cu_num_logits,
            "idx_mapping": b.idx_mapping,
            "prefill_len": b.prefill_len,
        }

    kernel, ours = input_batch.get_num_sampled_and_rejected, plain.get_num_sampled_and_rejected
    (expected, got) = (function(**arguments()) for function in (kernel, ours))
    assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


@few
@given(seeds)
def test_temperatures_and_greedy_tokens(seed):
    b = Batch(seed)
    logits = torch.randn(b.num_reqs, VOCAB, generator=b.generator).round(decimals=1)  # ties, at times
    temperature = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.7])
    divided = [logits.clone(), logits.clone()]
    gumbel.apply_temperature(divided[0], b.idx_mapping, temperature)
    plain.apply_temperature(divided[1], b.idx_mapping, temperature)
    assert torch.equal(*divided)
    greedy, seed, pos = torch.zeros(SLOTS), integers(b.generator, -(2**31), 2**31 - 1, SLOTS).long(), b.idx_mapping + 5
    seed = seed << 31 ^ seed
    for hot in (greedy, temperature):
        arguments = (logits, b.idx_mapping, hot, seed, pos, False, False)
        assert torch.equal(gumbel.gumbel_sample(*arguments), plain.gumbel_sample(*arguments))


def test_noise_is_vllms_wherever_it_can_decide():
    """A token is chosen by the largest noise of many, so it is compared over a real vocabulary, drawn flat."""
    rows, vocab = 4, 131_072
    slot, flat = torch.arange(rows, dtype=torch.int32), torch.zeros(rows, vocab)
    seed, pos = torch.tensor([0, -1, 2**62 + 12345, -(2**63)]), torch.tensor([0, 1, 4095, 2**31 - 1])
    drawn = gumbel.gumbel_sample(flat, slot, torch.ones(rows), seed, pos, False, False)
    noise = plain.gumbel_noise(seed, pos, vocab)
    assert torch.equal(noise.argmax(dim=-1), drawn)
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(1.6449, abs=0.03)


def test_vllms_top_k_kernel_still_cannot_be_interpreted():
    """Death test of ``apply_top_k_top_p``."""
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

    with pytest.raises(Exception, match="object has no attribute 'to'"):
        apply_top_k_top_p_triton(torch.randn(2, 64), torch.full((2,), 5, dtype=torch.int32), None)


def test_top_k_takes_keywords_of_a_later_vllm():
    from vllm.v1.worker.gpu.sample import states

    shims.use_torch_for_runner_kernels()
    logits = torch.arange(4.0)[None]
    kept = states.apply_top_k_top_p(logits, torch.tensor([2]), None, something_new=True)
    assert kept.isfinite().tolist() == [[False, False, True, True]]


@few
@given(seeds, st.sampled_from([31, 32, 70]))
def test_penalties(seed, vocab):
    """Rows of a request lie next to each other, each with those before it as drafts to its left."""
    g = torch.Generator().manual_seed(seed)
    num_tokens = integers(g, 2, MODEL_LEN, SLOTS)
    prompt_len = (num_tokens * torch.rand(SLOTS, generator=g)).int()
    all_token_ids = integers(g, 0, vocab, SLOTS, MODEL_LEN)
    slots = torch.randperm(SLOTS, generator=g)[:4]

    def counts():
        return {
            "expanded_idx_mapping": slots,
            "all_token_ids": all_token_ids,
            "prompt_len": prompt_len,
            "prefill_len": num_tokens,
            "prompt_bin_mask": torch.full((SLOTS, -(-vocab // 32)), -1, dtype=torch.int32),
            "output_bin_counts": torch.full((SLOTS, vocab), 7, dtype=torch.int32),
            "max_prefill_len": MODEL_LEN,
        }

    run_both(*kernels_of(penalties, "bincount"), counts, "prompt_bin_mask", "output_bin_counts")
    counted = counts()
    plain.count_tokens(**counted)
    widths = integers(g, 1, 5, len(slots)).tolist()
    logits = torch.randn(sum(widths), vocab, generator=g)
    token_ids = integers(g, 0, vocab, sum(widths))

    def arguments():
        return {
            "logits": logits.clone(),
            "expanded_idx_mapping": slots.repeat_interleave(torch.tensor(widths)),
            "token_ids": token_ids,
            "expanded_local_pos": torch.cat([torch.arange(w, dtype=torch.int32) for w in widths]),
            "repetition_penalty": torch.tensor([1.0, 1.3, 0.7, 1.0, 1.0, 2.0]),
            "frequency_penalty": torch.tensor([0.0, 0.0, -0.4, 0.6, 0.0, 1.5]),
            "presence_penalty": torch.tensor([0.0, 0.5, 0.0, 0.0, -1.0, 0.3]),
            "prompt_bin_mask": counted["prompt_bin_mask"],
            "output_bin_counts": counted["output_bin_counts"],
        }

    results = [arguments(), arguments()]
    for form, own in zip(kernels_of(penalties, "apply_penalties"), results, strict=True):
        form(**own)
    assert torch.allclose(results[0]["logits"], results[1]["logits"], rtol=0, atol=1e-6)


@few
@given(seeds)
def test_mamba_blocks_advance(seed):
    b, written = Batch(seed), []
    state_idx, accepted = integers(b.generator, -1, 3, SLOTS), integers(b.generator, 1, 4, SLOTS)
    for kernel in (mamba_utils.preprocess_mamba_align_fused_kernel, plain.Launcher(plain.advance_mamba_blocks)):
        own = [state_idx.clone(), accepted.clone(), *(torch.full((SLOTS,), -7, dtype=torch.int32) for _ in "ab")]
        arguments = (b.idx_mapping, own[0], b.num_computed, b.query_start_loc, *own[1:], b.num_reqs)
        kernel[(1,)](*arguments, BLOCK_SIZE=256, MAMBA_BLOCK_SIZE=8)
        written.append(own)
    assert all(torch.equal(x, y) for x, y in zip(*written, strict=True))


@few
@given(seeds)
def test_accepted_tokens(seed):
    b, written = Batch(seed), []
    rows = b.idx_mapping.clone()
    rows[0] = -1
    num_sampled = integers(b.generator, 0, 5, b.num_reqs)
    for kernel in kernels_of(mamba_hybrid, "_scatter_num_accepted_kernel"):
        accepted = torch.full((SLOTS,), -7, dtype=torch.int32)
        kernel[(b.num_reqs,)](rows, num_sampled, accepted)
        written.append(accepted)
    assert torch.equal(*written)


def kernels_of(owner, name: str):
    """vLLM's, and what stands in for it."""
    shims.use_torch_for_runner_kernels()
    shims.use_torch_for_runner_kernels()  # a second model in the process
    return getattr(owner, name).__wrapped__, getattr(owner, name)


def block_tables(seed: int) -> BlockTables:
    """Three groups, the middle one without slots (Mamba); staged, then written by the forms in use."""
    generator = torch.Generator().manual_seed(seed)
    tables = BlockTables(
        [4, 16, 8], SLOTS, 64, [12, 3, 6], torch.device("cpu"), slot_mapping_enabled=[True, False, True]
    )
    for request in range(SLOTS):
        ids = [integers(generator, 1, 90, int(integers(generator, 1, n + 1, 1))).tolist() for n in (12, 3, 6)]
        tables.append_block_ids(request, tuple(ids), overwrite=True)
    tables.apply_staged_writes()
    return tables


@few
@given(seeds)
def test_block_tables_and_slots(seed):
    b, written = Batch(seed), []
    positions = torch.cat([torch.arange(n) for n in b.query_start_loc.diff()])
    rows = b.idx_mapping.clone()
    for form in (0, 1):
        tables = block_tables(seed)
        gather = kernels_of(BlockTables, "gather_block_tables")[form]
        slots = kernels_of(BlockTables, "compute_slot_mappings")[form]
        for table in tables.input_block_tables:
            table.fill_(77)
        out = [t.clone() for t in gather(tables, b.idx_mapping, SLOTS)]
        rows[-1] = -1
        written.append([*out, *tables.input_block_tables, slots(tables, rows, b.query_start_loc, positions, 50)])
        written[-1].append(tables.slot_mappings)
    assert all(torch.equal(x, y) for x, y in zip(*written, strict=True))


STAND_INS = {name: function for names in shims.STAND_INS.values() for name, (function, _) in names.items()}


def test_what_has_one_name_in_two_places_is_one_function():
    functions = {}
    for names in shims.STAND_INS.values():
        for name, (function, _) in names.items():
            assert functions.setdefault(name, function) is function


def test_vllms_own_callers_pass_no_more_than_the_stand_ins_take():
    """By position: keywords that a later vLLM adds are passed over (next test), one argument more ends the engine."""
    found = dict.fromkeys(STAND_INS, 0)
    folder = pathlib.Path(input_batch.__file__).parent
    # a drafter's are others of the same names
    for file in [*folder.glob("*.py"), *folder.glob("sample/*.py"), *folder.glob("model_states/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.value if isinstance(node.func, ast.Subscript) else node.func  # a kernel, on a grid
            name = getattr(called, "id", getattr(called, "attr", ""))
            if name not in STAND_INS:
                continue
            parameters = inspect.signature(STAND_INS[name]).parameters
            is_method = "self" in parameters and isinstance(node.func, ast.Attribute)
            assert len(node.args) + is_method <= len(parameters), f"{file.name}:{node.lineno}"
            found[name] += 1
    assert all(found.values()), found


def test_keywords_of_a_later_vllm_are_passed_over():
    """As ``num_computed_tokens`` of 0.33's ``gather_block_tables``, and what a kernel's launch may gain."""
    b, tables = Batch(0), block_tables(0)
    gather = kernels_of(BlockTables, "gather_block_tables")[1]
    got = gather(tables, b.idx_mapping, SLOTS, num_computed_tokens=b.num_computed)
    expected = [t.clone() for t in got]
    assert all(torch.equal(x, y) for x, y in zip(expected, gather(tables, b.idx_mapping, SLOTS), strict=True))
    accepted = torch.zeros(SLOTS, dtype=torch.int32)
    scatter = mamba_hybrid._scatter_num_accepted_kernel
    scatter[(b.num_reqs,)](b.idx_mapping, torch.full((b.num_reqs,), 3), num_accepted=accepted, SOMETHING_NEW=8)
    assert accepted[b.idx_mapping.long()].tolist() == [3] * b.num_reqs


@few
@given(seeds)
def test_staged_writes(seed):
    from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor

    results = []
    for form in (0, 1):
        shims.use_torch_for_runner_kernels()
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((FusedStagedWriter, "apply"), (StagedWriteTensor, "apply_write")):
                patch.setattr(owner, name, kernels_of(owner, name)[form])
            tables = block_tables(seed)
            line = StagedWriteTensor(9, dtype=torch.int32, device=torch.device("cpu"))
            line.stage_write_elem(4, 5)
            line.stage_write(7, 0, [6])
            line.apply_write()
            line.apply_write()  # nothing left
        results.append([line.gpu, *(t.gpu for t in tables.block_tables)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_zeroed_blocks():
    """Two segments of one allocation with pages smaller than their stride."""
    results = []
    for form in (0, 1):
        memory = torch.arange(1, 201, dtype=torch.int32)
        zeroer = types.SimpleNamespace(
            device=torch.device("cpu"),
            _meta=(
                torch.tensor([memory.data_ptr(), memory.data_ptr() + 8 * 4], dtype=torch.uint64),
                torch.tensor([20, 20]),
                torch.tensor([8, 5]),
                1,
                8,
                2,
            ),
        )
        kernels_of(KVBlockZeroer, "zero_block_ids")[form](zeroer, [3, 0, 7])
        results.append(memory)
    assert torch.equal(*results)
    assert (results[0] == 0).sum() == 3 * 13


class MambaCaches:
    """Two groups of layers with caches of convolution windows and scan states, filled at random, blocks apart as pages
    are, and what ``MambaSpecDecodeGPUContext`` notes about them.
    """

    WIDTH, BLOCK_SIZE, COLUMNS = 5, 8, 6

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        blocks = SLOTS * self.COLUMNS
        self.pages = [torch.randn(blocks, 40, generator=g) for _ in range(3)]
        windows = [page[:, : self.WIDTH * 3].view(blocks, self.WIDTH, 3) for page in self.pages]
        scans = [page[:, 20:37] for page in self.pages]
        self.tables = [torch.randperm(blocks, generator=g).to(torch.int32).view(SLOTS, -1) for _ in range(2)]
        states = [*windows, *scans]
        count = len(states)
        self.context = types.SimpleNamespace(
            is_initialized=True,
            block_size=self.BLOCK_SIZE,
            num_states=count,
            state_base_addrs=torch.tensor([state.data_ptr() for state in states]),
            state_block_strides=torch.tensor([4 * state.stride(0) for state in states]),
            state_elem_sizes=torch.full((count,), 4, dtype=torch.int32),
            state_inner_sizes=torch.tensor([3] * 3 + [17] * 3),
            state_conv_widths=torch.tensor([self.WIDTH] * 3 + [0] * 3, dtype=torch.int32),
            state_group_indices=torch.tensor([0, 0, 1] * 2, dtype=torch.int32),
            state_dim_row_count=torch.zeros(count, dtype=torch.int32),
            state_dim_row_stride=torch.zeros(count, dtype=torch.int64),
            block_table_ptrs=torch.tensor([table.data_ptr() for table in self.tables]),
            block_table_stride_req=self.COLUMNS,
            num_accepted_tokens_out=torch.zeros(SLOTS, dtype=torch.int32),
        )


def mamba_rows(generator: torch.Generator) -> torch.Tensor:
    return torch.cat([torch.randperm(SLOTS, generator=generator)[:4], torch.tensor([-1])]).to(torch.int32)


@settings(max_examples=4, deadline=None)
@given(seeds)
def test_mamba_states_copied_before_a_step(seed):
    g, results = torch.Generator().manual_seed(seed), []
    rows, source, target = mamba_rows(g), integers(g, -1, 3, SLOTS), integers(g, 0, 3, SLOTS)
    bias = torch.zeros(SLOTS, dtype=torch.int32)
    for form in kernels_of(mamba_utils.MambaSpecDecodeGPUContext, "run_fused_precopy"):
        caches = MambaCaches(seed)
        form(caches.context, len(rows), target, source, bias, rows)
        results.append(torch.stack(caches.pages))
    assert torch.equal(*results)
    moved = [r for r in rows.tolist() if r >= 0 and source[r] >= 0 and source[r] != target[r]]
    assert torch.equal(results[0], torch.stack(MambaCaches(seed).pages)) == (not moved)


@settings(max_examples=4, deadline=None)
@given(seeds)
def test_mamba_states_kept_after_a_step(seed):
    """vLLM's kernel has nothing to do either where one token is accepted, and our steps say no more."""
    g = torch.Generator().manual_seed(seed)
    rows, computed = mamba_rows(g), integers(g, MambaCaches.BLOCK_SIZE, 3 * MambaCaches.BLOCK_SIZE, SLOTS)
    written_to = (computed - 1) // MambaCaches.BLOCK_SIZE
    for form in kernels_of(mamba_utils.MambaSpecDecodeGPUContext, "run_fused_postprocess_align"):
        caches, accepted = MambaCaches(seed), torch.ones(SLOTS, dtype=torch.int32)
        form(caches.context, len(rows), accepted, written_to, computed, rows)
        assert torch.equal(torch.stack(caches.pages), torch.stack(MambaCaches(seed).pages))
        assert (accepted == 1).all()
