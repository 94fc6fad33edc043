"""A few dozen held-out questions through the real engine: the smoke version of ``benchmarks/quality.py``."""

import pytest

from benchmarks.quality import evaluate
from benchmarks.quality_parts.questions import FAMILIES, Outcome, held_out, shares
from benchmarks.quality_parts.report import markdown
from vllm_twotower.commands.cli import DEMO_MODEL

PER_FAMILY = 3


@pytest.fixture(scope="module")
def report():
    return evaluate(DEMO_MODEL, PER_FAMILY, gammas=(0.8,), steps=(16,), prose=0)


def test_the_published_setting_on_a_few_questions(report):
    """With room below results/quality.md: AR 98.9 %, and 80.1 % at 5.01 tokens per forward."""
    (row,) = report["mask_diffusion"]
    assert report["questions"] == PER_FAMILY * len(FAMILIES)
    assert row["tokens"] >= 20 * report["questions"]
    assert report["ar"]["exact"]["overall"] >= 0.9
    assert row["exact"]["overall"] >= 0.65
    assert row["tokens_per_forward"] >= 4
    assert row["tokens_per_forward"] == pytest.approx(
        row["tokens"] / (row["denoise_passes"] + row["context_passes"]), abs=1e-3
    )
    assert "gamma 0.8, T 16" in markdown({**report, "ablations": [], "bits_per_byte": 0.0})


def test_self_speculation_keeps_all_of_it(report):
    row, ar = report["self_speculation"], report["ar"]
    assert [row[name] for name in ("exact", "tokens", "unfinished")] == [
        ar[n] for n in ("exact", "tokens", "unfinished")
    ]
    assert row["tokens_per_forward"] > 3 * ar["tokens_per_forward"]


def test_the_plain_reference_finds_what_the_engine_found(report):
    """Same tokens in as many passes, so the same answers."""
    from benchmarks.quality_parts.ablations import PlainRun

    plain, (engine,) = PlainRun(DEMO_MODEL).ask(held_out(PER_FAMILY), "as published").row(), report["mask_diffusion"]
    for figure in ("exact", "unfinished", "tokens", "denoise_passes"):
        assert plain[figure] == engine[figure], figure


def test_an_answer_that_does_not_end_is_wrong():
    (item,) = held_out(1)[:1]
    assert shares([item, item], [item.answer, None]) == {item.family: 0.5, "overall": 0.5}
    assert Outcome({}, 0, 30, 8, 2).tokens_per_forward == 3.0
