"""The picture of benchmarks/roofline.py: speed-up over batch, with overhead and at the memory floor, and throughput
against speed per user.
"""

import pathlib

COLOURS = {"bf16": "#1f6fb4", "fp8": "#d1622b"}
STYLES = {("colocated", 1): "-", ("colocated", 2): "--", ("split", 2): ":"}
CASES = {"overhead": "with the overhead others measured", "floor": "at the memory floor"}
PLACES = {("colocated", 1): "one GPU", ("colocated", 2): "two GPUs, colocated", ("split", 2): "two GPUs, split"}


def draw(result: dict, path: pathlib.Path) -> None:
    """Write a PNG; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    gpus = list(result["gpus"])
    figure, axes = plt.subplots(3, len(gpus), figsize=(13, 12), sharey="row", constrained_layout=True)
    for column, gpu in enumerate(gpus):
        for row, (case, name) in enumerate(CASES.items()):
            _speed_up(axes[row][column], f"{gpu}, {name}", _rows_of(result, case, gpu))
        _per_user(axes[2][column], gpu, _rows_of(result, "overhead", gpu))
    for row in range(len(CASES)):
        axes[row][0].set_ylabel("speed-up over AR, same GPUs, same batch")
    axes[2][0].set_ylabel("tokens/s, all requests")
    most = max(axes[0], key=lambda axis: len(axis.get_legend_handles_labels()[0]))
    axes[1][0].legend(*most.get_legend_handles_labels(), fontsize=8, loc="upper left")
    load = result["workload"]
    figure.suptitle(
        f"30B-A3B, mask diffusion beside AR: an estimate by bytes and FLOPs, no measurement of ours "
        f"({load['passes_per_canvas']} passes per canvas of {load['canvas_length']}, "
        f"{load['context_length']:,} tokens of context)"
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _rows_of(result: dict, case: str, gpu: str) -> list[dict]:
    return [row for row in result["cases"][case]["sweep"] if row["gpu"] == gpu and row["fits"]]


def _lines(rows: list[dict]) -> dict[tuple[str, int, str], list[dict]]:
    lines: dict[tuple[str, int, str], list[dict]] = {}
    for row in rows:
        lines.setdefault((row["placement"], row["num_gpus"], row["precision"]), []).append(row)
    return lines


def _speed_up(axis, title: str, rows: list[dict]) -> None:
    axis.axhline(1.0, color="black", linewidth=1)
    axis.axhspan(0, 1, color="#eeeeee", zorder=0)
    axis.text(1.05, 0.04, "AR is faster", fontsize=9, color="#666666")
    for (placement, num_gpus, precision), line in _lines(rows).items():
        axis.plot(
            [row["batch"] for row in line],
            [row["speed_up"] for row in line],
            STYLES[placement, num_gpus],
            color=COLOURS[precision],
            marker="o",
            markersize=3,
            label=f"{PLACES[placement, num_gpus]}, {precision}",
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 256], labels=["1", "2", "4", "8", "16", "32", "64", "128", "256"])
    axis.set_ylim(0, 2.4)
    axis.set_xlabel("requests running at once")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)


def _per_user(axis, gpu: str, rows: list[dict]) -> None:
    """Two GPUs, colocated: what a user gets against what the machine gives, AR thin and diffusion thick."""
    for (placement, num_gpus, precision), line in _lines(rows).items():
        if (placement, num_gpus) != ("colocated", 2):
            continue
        for kind, width, alpha in (("ar", 1.2, 0.7), ("diffusion", 2.2, 1.0)):
            rates = [row[kind] for row in line]
            users = [rate / row["batch"] for rate, row in zip(rates, line, strict=True)]
            name = "AR" if kind == "ar" else "mask diffusion"
            axis.plot(users, rates, color=COLOURS[precision], linewidth=width, alpha=alpha,
                      linestyle="--" if kind == "ar" else "-", marker="o", markersize=2 + width,
                      label=f"{name}, {precision}")  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([50, 100, 200, 400, 800], labels=["50", "100", "200", "400", "800"])
    axis.xaxis.set_minor_formatter("")
    axis.set_xlim(50, 1500)
    axis.set_xlabel("tokens/s of one request (batch 256 left, 1 right)")
    axis.set_title(f"2 x {gpu}, colocated, with overhead", fontsize=11)
    axis.legend(fontsize=8, loc="upper right")
    axis.grid(alpha=0.3, which="both")
