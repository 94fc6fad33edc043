"""Numbers on their way to the device."""

import numpy as np
import torch

from vllm_twotower.runtime.host_copies import ALIGNED_BYTES, copy_together

CPU = torch.device("cpu")


def test_vectors_arrive_as_they_were_and_begin_where_kernels_expect_it():
    sent = copy_together(CPU, [3, 1, 2], np.array([], dtype=np.int64), range(4), np.array([5], dtype=np.int32))
    assert [v.tolist() for v in sent] == [[3, 1, 2], [], [0, 1, 2, 3], [5]]
    assert {v.dtype for v in sent} == {torch.int64}
    assert {v.storage_offset() * v.element_size() % ALIGNED_BYTES for v in sent} == {0}


def test_other_types_and_nothing_at_all():
    yes, numbers = copy_together(CPU, [True, False], [False] * 17, dtype=np.bool_)
    assert yes.tolist() == [True, False]
    assert numbers.tolist() == [False] * 17
    assert numbers.storage_offset() == ALIGNED_BYTES
    assert [len(v) for v in copy_together(CPU, [], [], dtype=np.int32)] == [0, 0]


def test_what_was_sent_does_not_change_with_what_it_was_made_of():
    source = np.array([1, 2], dtype=np.int64)
    (sent,) = copy_together(CPU, source)
    source[:] = 0
    assert sent.tolist() == [1, 2]
