"""What ``vllm-twotower trace`` records equals NVIDIA's reference, and what self-speculation wrote; its page works in a
real browser."""

import html
import json
import re
import subprocess

import pytest

from benchmarks.quality_parts.questions import held_out
from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from tests.test_self_speculation import SPECULATING, params
from tools.screenshot import find_browser
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.commands.live import Recording
from vllm_twotower.commands.trace_page import list_canvases, render_page

# Drives the page as a person would, and leaves what it saw in the document's title.
CLICKS = """
<script>
pause();
go(0);
const seen = {frames: frames.length, start: shown()};
function shown() {
  const text = (id) => document.getElementById(id).textContent;
  return {
    title: text("canvas-title"), passes: text("passes"), commits: text("commits"), tokens: text("tokens"),
    own: document.querySelectorAll(".cell.own").length, accepted: document.querySelectorAll(".cell.accepted").length,
    rejected: document.querySelectorAll(".cell.rejected").length,
    rounds: [...document.querySelectorAll("#rounds li")].map(
      (li) => ["known", "accepted", "own", "rejected"].map(
        (name) => [...li.querySelectorAll(".token." + name + ":not(.trimmed)")].map((n) => n.textContent).join(""))),
    masked: document.querySelectorAll(".cell.masked").length, fresh: document.querySelectorAll(".cell.fresh").length,
    text: text("text"),
  };
}
document.getElementById("step").click();
seen.stepped = shown();
seen.frames_shown = frames.map((_, i) => { go(i); return shown(); });
go(1);
document.getElementById("back").click();
seen.back = shown();
const slider = document.getElementById("at");
slider.value = slider.max;
slider.dispatchEvent(new Event("input"));
seen.end = shown();
const cell = document.querySelector(".cell");
cell.dispatchEvent(new MouseEvent("mousemove", {bubbles: true, clientX: 20, clientY: 20}));
seen.tip = document.getElementById("tip").textContent;
document.getElementById("speed").value = "120";
document.getElementById("play").click();
seen.playing = document.getElementById("play").textContent;
setTimeout(() => {
  seen.played = at;
  document.getElementById("play").click();
  seen.paused = document.getElementById("play").textContent;
  document.title = JSON.stringify(seen);
}, 1000);
</script>
"""


@pytest.fixture(scope="module")
def case(tiny_moe):
    return tiny_moe.cases(16)[7]


@pytest.fixture(scope="module")
def recording(tiny_moe, case):
    with start_engine(tiny_moe.path, {"passes_per_step": 2}) as e:
        e.llm.collective_rpc("diffusion_trace_start")
        (tokens,) = e.tokens([case["prompt"]], golden_params(case))
        (passes,) = e.llm.collective_rpc("diffusion_trace_take")[0].values()
    return Recording("</script><b>prompt", passes, tokens, "")


def decode(token: int) -> str:
    return f"<{token}>"


def test_the_canvases_are_the_references(case, recording):
    assert [p["tokens"] for p in recording.records] == [step["xt"] for step in case["trace"]]


def test_every_position_is_shown_as_it_was_revealed(case, recording):
    canvases = list_canvases(recording, decode)
    cells = [cell for canvas in canvases for cell in canvas["cells"]]
    assert [cell["text"] for cell in cells if cell["kept"]] == [decode(t) for t in recording.token_ids]
    assert sum(len(canvas["passes"]) for canvas in canvases) == len(case["trace"])
    for canvas in canvases:
        for index, proposals in enumerate(canvas["passes"]):
            masked = {p for p, cell in enumerate(canvas["cells"]) if cell["pass"] > index}
            assert set(proposals) == masked, "revealed positions propose nothing"
        for position, cell in enumerate(canvas["cells"]):
            text, confidence = canvas["passes"][cell["pass"] - 1][position][0]
            assert (text, confidence) == (cell["text"], cell["confidence"])
            assert 0 < confidence <= 1


def test_a_page_needs_passes():
    alone = {"drafts": [], "num_accepted": 0, "next_token": 4}
    for records in ([], [alone]):
        with pytest.raises(ValueError, match="mask_diffusion"):
            render_page(Recording("", records, [4], ""), decode, "", "", 0.8)


def record_rounds(e, prompts, **more):
    """Recordings of self-speculation, and how often drafts were verified and kept."""
    e.stats()
    e.llm.collective_rpc("diffusion_trace_start")
    asked = params("self_speculation", ignore_eos=False, max_tokens=64, **more)
    outputs = e.tokens(prompts, asked, 2000)
    records = e.llm.collective_rpc("diffusion_trace_take")[0]
    e.llm.collective_rpc("diffusion_trace_stop")
    of_index = {int(req_id.split("-")[0]): own for req_id, own in records.items()}
    recordings = [Recording("prompt", of_index[index], tokens, "") for index, tokens in enumerate(outputs)]
    return recordings, e.stats()


@pytest.fixture(scope="module")
def rounds():
    """Of the demo model, whose drafts are right now and then: four requests, drafts of three passes, then of one."""
    with start_engine(DEMO_MODEL, SPECULATING, skip_tokenizer_init=False) as e:
        prompts = [e.llm.get_tokenizer().encode(item.prompt) for item in held_out(1)[:4]]
        e.llm.collective_rpc("diffusion_trace_start")
        e.llm.collective_rpc("diffusion_trace_stop")
        e.tokens(prompts, params("self_speculation", max_tokens=8))
        assert e.llm.collective_rpc("diffusion_trace_take") == [{}], "nothing is recorded once it is stopped"
        return [record_rounds(e, prompts, max_steps=max_steps) for max_steps in (3, 1)]


def steps_of(recording):
    return [record for record in recording.records if "drafts" in record]


def test_kept_drafts_and_next_tokens_are_the_output(rounds):
    for recordings, stats in rounds:
        for recording in recordings:
            written = []
            for step in steps_of(recording):
                written += [*step["drafts"][: step["num_accepted"]], step["next_token"]]
                # the first draft that was not kept is not what came in its place
                assert step["drafts"][step["num_accepted"] :][:1] != [step["next_token"]]
            assert written[: len(recording.token_ids)] == recording.token_ids
            assert steps_of(recording)[0]["drafts"] == [], "the first token comes from the prompt"
        steps = [step for recording in recordings for step in steps_of(recording)]
        assert sum(step["drafts"] != [] for step in steps) == stats["drafts"]
        assert sum(len(step["drafts"]) for step in steps) == stats["draft_tokens"]
        assert sum(step["num_accepted"] for step in steps) == stats["accepted_tokens"]
        assert 0 < stats["accepted_tokens"] < stats["draft_tokens"], "else nothing is shown"


def test_plain_steps_between_rounds_are_recorded(tiny_moe):
    """A random model's drafts are wrong, so most tokens are from steps without one; preempted drafts are no rounds."""
    cases = tiny_moe.ar[3:]
    with start_engine(tiny_moe.path, num_gpu_blocks_override=14) as e:
        e.llm.collective_rpc("diffusion_trace_start")
        outputs = e.tokens([c["prompt"] for c in cases], params("self_speculation", max_tokens=20), 3000)
        records = e.llm.collective_rpc("diffusion_trace_take")[0]
        assert e.num_preemptions > 0
    for req_id, own in records.items():
        recording = Recording("", own, outputs[int(req_id.split("-")[0])], "")
        texts = []
        for canvas in list_canvases(recording, decode):
            texts += [cell["text"] for cell in canvas["cells"] if cell["kept"]]
            texts += [canvas["verified"]["next"]] * canvas["verified"]["kept"]
        assert texts == [decode(token) for token in recording.token_ids]


def test_every_draft_is_shown_as_it_was_verified(rounds):
    """The cells are known token and drafts, passes said what they proposed, hints needed none."""
    num_hints = num_late = 0
    for recordings, stats in rounds:
        for recording in recordings:
            shown, steps = list_canvases(recording, decode), steps_of(recording)
            assert len(shown) == len(steps)
            known = None
            for canvas, step in zip(shown, steps, strict=True):
                drafted = [decode(token) for token in step["drafts"]]
                assert [cell["text"] for cell in canvas["cells"]] == ([known, *drafted] if drafted else [])
                accepted = [cell["kept"] for cell in canvas["cells"]]
                assert accepted[1 + step["num_accepted"] :] == [False] * (len(drafted) - step["num_accepted"])
                assert not any(accepted[:1]), "the known token was written before"
                num_hints += sum(cell["pass"] == 0 for cell in canvas["cells"][1:])
                num_late += sum(cell["pass"] > 1 for cell in canvas["cells"])
                known = canvas["verified"]["next"]
            kept = sum(cell["kept"] for c in shown for cell in c["cells"]) + sum(c["verified"]["kept"] for c in shown)
            assert kept == len(recording.token_ids)
        assert sum(len(c["passes"]) for r in recordings for c in list_canvases(r, decode)) == stats["denoise_passes"]
    assert num_hints > 0
    assert num_late > 0


def play(recording, threshold, tmp_path):
    """The page in a browser, driven by ``CLICKS``: what it showed."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no browser: apt-get install chromium")
    page = render_page(recording, decode, "A title", "About it", threshold)
    assert not re.search(r'(src|href)="?http', page), "self-contained"
    (tmp_path / "trace.html").write_text(page.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'trace.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))


def test_the_page_plays_in_a_browser(case, recording, tmp_path):
    seen = play(recording, case["params"]["confidence_threshold"], tmp_path)
    canvases, num_passes = list_canvases(recording, decode), len(recording.records)
    assert seen["frames"] == num_passes + len(canvases) + len(canvases) - 1
    assert seen["start"]["masked"] == 16
    assert seen["back"] == seen["start"]
    assert seen["stepped"]["passes"] == "1"
    first = [cell for cell in canvases[0]["cells"] if cell["pass"] == 1]
    assert seen["stepped"]["fresh"] == len(first)
    assert seen["stepped"]["masked"] == 16 - len(first)
    assert seen["end"]["title"].endswith("finished")
    assert seen["end"]["text"] == recording.prompt + "".join(c["text"] for canvas in canvases for c in canvas["cells"])
    assert seen["end"]["passes"] == str(num_passes)
    assert seen["end"]["commits"] == str(len(canvases) - 1)
    assert seen["end"]["tokens"] == str(len(recording.token_ids))
    assert canvases[-1]["cells"][0]["text"] in seen["tip"]
    assert (seen["playing"], seen["paused"]) == ("Pause", "Play")
    assert seen["played"] > 0
    assert seen["end"]["rounds"] == []


def test_the_page_of_drafts_plays_in_a_browser(rounds, tmp_path):
    """What was kept, struck out and the context tower's own, round by round."""
    recording = rounds[0][0][0]
    seen = play(recording, 0.8, tmp_path)
    shown, steps = list_canvases(recording, decode), steps_of(recording)
    num_passes = sum(len(canvas["passes"]) for canvas in shown)
    with_draft = [step for step in steps if step["drafts"]]
    # each draft as it starts, after each pass and as it is verified; a step without a draft is one frame
    assert seen["frames"] == num_passes + len(with_draft) + len(steps)
    verified = [frame for frame in seen["frames_shown"] if "verified" in frame["title"]]
    assert [(f["accepted"], f["rejected"]) for f in verified] == [
        (step["num_accepted"], len(step["drafts"]) - step["num_accepted"]) for step in with_draft
    ]
    assert [f["own"] for f in verified] == [c["verified"]["kept"] for c in shown if c["cells"]]
    assert seen["end"]["text"].startswith(recording.prompt + "".join(decode(token) for token in recording.token_ids))
    assert seen["end"]["passes"] == str(num_passes)
    assert seen["end"]["commits"] == str(len(steps) - 1)
    assert seen["end"]["tokens"] == str(len(recording.token_ids))
    for texts, step, known in zip(seen["end"]["rounds"][1:-1], steps[1:], steps[:-1], strict=False):
        drafts = [decode(token) for token in step["drafts"]]
        kept, struck = "".join(drafts[: step["num_accepted"]]), "".join(drafts[step["num_accepted"] :])
        assert texts == [decode(known["next_token"]), kept, decode(step["next_token"]), struck]
