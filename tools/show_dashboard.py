"""Draw the dashboard of ``examples/deploy`` from a real server under load, and check that each query has an answer.

    python -m tools.show_dashboard               # needs Debian's prometheus (2.42) and chromium; four minutes
    python -m tools.show_dashboard --minutes 1 --picture /tmp/now.png

Grafana is neither in Debian nor on a package index, so Prometheus' own graphs draw the panels: on a console page, with
the queries, titles and legends of ``grafana/dashboard.json``. Requests of both modes are sent to the demo model.
"""

import argparse
import contextlib
import html
import itertools
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator

from benchmarks.quality_parts.questions import held_out
from tests.harness.server import find_free_port, vllm_server
from tools.make_readme import serve_arguments
from tools.screenshot import find_browser, take_screenshot

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "examples" / "deploy"
PICTURE = ROOT / "docs" / "dashboard.png"
TARGET = "vllm:8000"
RATE_INTERVAL = "20s"
"""What Grafana puts for ``$__rate_interval`` at that file's scrape interval: four of them."""
MODES = ("mask_diffusion", "self_speculation")
CLIENTS = range(1, 7)
PANEL = '<div><h6>{title}</h6><div id="panel{index}"></div></div>\n'
GRAPH = 'new PromConsole.Graph({{node: document.getElementById("panel{index}"), expr: {queries}, name: {names}}});\n'
PAGE = """<!DOCTYPE html>
<meta charset="utf-8">
<link rel="stylesheet" href="/classic/static/rickshaw/rickshaw.min.css">
<link rel="stylesheet" href="/classic/static/bootstrap4/css/bootstrap.min.css">
<link rel="stylesheet" href="/classic/static/css/prom_console.css">
<script src="/classic/static/d3/d3.min.js"></script>
<script src="/classic/static/rickshaw/rickshaw.min.js"></script>
<script>const PATH_PREFIX = "";</script>
<script src="/classic/static/js/prom_console.js"></script>
<style>
body {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px 16px; padding: 12px; }}
h6 {{ margin: 4px 0 12px; }}
.rickshaw_graph svg {{ overflow: visible; clip-path: inset(-10px 0); }}
.prom_graph_xtitle, .prom_graph_link {{ display: none; }}
</style>
{panels}<script>
const look = {{duration: {seconds}, min: 0, height: 130, yAxisTicks: 3, yAxisFormatter: y => +y.toPrecision(3)}};
Object.assign(PromConsole.graphDefaults, look);
{graphs}</script>
"""


def read_panels() -> list[dict]:
    return json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]


def query_of(target: dict) -> str:
    return target["expr"].replace("$__rate_interval", RATE_INTERVAL)


def write_page(panels: list[dict], seconds: int) -> str:
    """A console page of Prometheus with a graph for each panel."""
    graphs = []
    for index, panel in enumerate(panels):
        # Grafana's {{label}} is [[ label ]] here, and would be a template of Prometheus'
        names = [re.sub(r"\{\{(\w+)\}\}", r"[[ \1 ]]", target["legendFormat"]) for target in panel["targets"]]
        queries = [query_of(target) for target in panel["targets"]]
        graphs.append(GRAPH.format(index=index, queries=json.dumps(queries), names=json.dumps(names)))
    titles = [PANEL.format(index=index, title=html.escape(panel["title"])) for index, panel in enumerate(panels)]
    return PAGE.format(panels="".join(titles), graphs="".join(graphs), seconds=seconds)


@contextlib.contextmanager
def prometheus(server: str, page: str, folder: pathlib.Path) -> Iterator[str]:
    """Prometheus with the deployment's configuration, but for the server's address; yields its own."""
    config = (DEPLOY / "prometheus.yml").read_text()
    assert TARGET in config
    (folder / "prometheus.yml").write_text(config.replace(TARGET, urllib.parse.urlsplit(server).netloc))
    (folder / "dashboard.html").write_text(page)
    address = f"127.0.0.1:{find_free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={address}", f"--web.console.templates={folder}"]
    command += [f"--web.console.libraries={folder}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def complete(server: str, prompt: str, mode: str) -> None:
    """Ask the server a question and wait for the answer."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 96, "temperature": 0}
    body["vllm_xargs"] = {"diffusion_mode": mode}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode(), headers)
    urllib.request.urlopen(request, timeout=120).read()


@contextlib.contextmanager
def load(server: str) -> Iterator[None]:
    """Clients that ask one question after the other, in the modes by turns, until the end of the block."""
    done = threading.Event()
    prompts = [item.prompt for item in held_out(8)]

    def ask(client: int) -> None:
        for count, prompt in enumerate(itertools.cycle(prompts[client:] + prompts[:client])):
            if done.is_set():
                return
            complete(server, prompt, MODES[(client + count) % len(MODES)])

    clients = [threading.Thread(target=ask, args=(client,)) for client in CLIENTS]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        done.set()
        for client in clients:
            client.join()


def answers(address: str, query: str) -> list[float]:
    """The values that Prometheus has for a query now, one a series."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=30) as response:
        return [float(series["value"][1]) for series in json.load(response)["data"]["result"]]


def check_queries(address: str, panels: list[dict]) -> list[str]:
    """Print what every query of the dashboard gives; returns those that give no number."""
    empty = []
    for panel in panels:
        for target in panel["targets"]:
            values = answers(address, query_of(target))
            print(
                f"{panel['title']}: {len(values)} series, {' '.join(f'{v:.4g}' for v in values)}\n    {target['expr']}"
            )
            if not any(map(math.isfinite, values)):
                empty.append(target["expr"])
    return empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--picture", type=pathlib.Path, default=PICTURE)
    args = parser.parse_args()
    browser = find_browser()
    if browser is None or shutil.which("prometheus") is None:
        sys.exit("prometheus and chromium have to be installed: apt-get install prometheus chromium")
    panels, seconds = read_panels(), round(60 * args.minutes)
    served = serve_arguments((ROOT / "README.md").read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(vllm_server(*served, log=folder / "log", cwd=ROOT))
        address = stack.enter_context(prometheus(server, write_page(panels, seconds), folder))
        with load(server):
            time.sleep(seconds)
            empty = check_queries(address, panels)
            page = f"{address}/consoles/dashboard.html"
            take_screenshot(browser, page, args.picture.resolve(), "1400,820", "--virtual-time-budget=20000")
    if empty:
        sys.exit("no answer to\n" + "\n".join(empty))


if __name__ == "__main__":
    main()
