"""What ``make conformance`` makes of results: a failure beyond the control's needs a reason."""

import pytest

from benchmarks.conformance_parts import report
from benchmarks.conformance_parts.sources import replace_token_ids

FILE = "tests/entrypoints/openai/test_a.py"
REFUSED = (
    "openai.BadRequestError: Error code: 400 - logprob_token_ids=[5] cannot be honoured in mask_diffusion: "
    "leave it out, or send diffusion_mode='ar' (parameter=None)"
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A control that passes two of three tests; the modes pass both."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    outcomes = {f"{FILE}::good": ("passed", ""), f"{FILE}::other": ("passed", ""), f"{FILE}::bad": ("failed", "x | y")}
    return {run: dict(outcomes) for run in ("control", *report.MODES, "plugin", "no-plugin")}


def read_page():
    return (report.RESULTS / "conformance-0.32.0.md").read_text()


def test_what_fails_in_the_control_too_is_no_difference(results):
    assert report.write_page(results, "0.32.0") == 0
    page = read_page()
    assert "| all | 2 / 1 / 0 | 2 / 1 / 0 | 2 / 1 / 0 | 2 / 1 / 0 |" in page
    assert "| test_a.py::bad | x \\| y |" in page


def test_a_refusal_is_a_reason_and_anything_else_is_none(results):
    results["mask_diffusion"][f"{FILE}::good"] = ("failed", REFUSED)
    assert report.write_page(results, "0.32.0") == 0
    refused = (
        "refused: logprob_token_ids cannot be honoured in mask_diffusion: leave it out, or send diffusion_mode='ar'"
    )
    assert f"| test_a.py::good | mask_diffusion | {refused}" in read_page()
    results["ar"][f"{FILE}::other"] = ("failed", "assert 1 == 2")
    assert report.write_page(results, "0.32.0") == 1
    assert "| test_a.py::other | ar | **no reason known**: assert 1 == 2 |" in read_page()


def test_each_mode_needs_a_reason_of_its_own(results):
    results["mask_diffusion"][f"{FILE}::good"] = ("failed", REFUSED)
    results["self_speculation"][f"{FILE}::good"] = ("failed", "assert 1 == 2")
    assert report.write_page(results, "0.32.0") == 1


def test_a_test_that_did_not_run_is_a_difference(results):
    del results["mask_diffusion"][f"{FILE}::good"]
    assert report.write_page(results, "0.32.0") == 1


def test_what_loading_the_plugin_breaks_counts_and_what_it_mends_does_not(results):
    results["no-plugin"][f"{FILE}::other"] = ("failed", "no such architecture")
    assert report.write_page(results, "0.32.0") == 0
    results["plugin"][f"{FILE}::good"] = ("failed", "assert 1 == 2")
    assert report.write_page(results, "0.32.0") == 1
    assert f"Fails with the plugin and passes without: `{FILE}::good`." in read_page()


def test_token_ids_are_replaced_and_nothing_else():
    text = '"logprob_token_ids": [100, 5000], "token_id:5000", {42, 5000}, [9454, 2753], "1" * 5000 + "}", [15000]'
    expected = '"logprob_token_ids": [100, 1176], "token_id:1176", {42, 1176}, [1342, 1073], "1" * 5000 + "}", [15000]'
    assert replace_token_ids(text) == expected
