"""What ``vllm-twotower trace`` records equals NVIDIA's reference; its page works in a real browser."""

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from vllm_twotower.commands.live import Recording
from vllm_twotower.commands.trace_page import canvases_of, render_page

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
    masked: document.querySelectorAll(".cell.masked").length, fresh: document.querySelectorAll(".cell.fresh").length,
    text: text("text"),
  };
}
document.getElementById("step").click();
seen.stepped = shown();
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
    assert [p["tokens"] for p in recording.passes] == [step["xt"] for step in case["trace"]]


def test_every_position_is_shown_as_it_was_revealed(case, recording):
    canvases = canvases_of(recording, decode)
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
    with pytest.raises(ValueError, match="mask_diffusion"):
        render_page(Recording("", [], [4], ""), decode, "", "", 0.8)


def test_the_page_plays_in_a_browser(case, recording, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser: apt-get install chromium")
    page = render_page(recording, decode, "A title", "About it", case["params"]["confidence_threshold"])
    assert not re.search(r'(src|href)="?http', page), "self-contained"
    (tmp_path / "trace.html").write_text(page.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'trace.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))

    canvases, num_passes = canvases_of(recording, decode), len(recording.passes)
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
