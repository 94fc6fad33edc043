"""The figures as a Markdown table and a picture."""

import pathlib

PUBLISHED = {"quality_retained": 0.987, "speed": 2.42}
"""NVIDIA's, of the 30B model at gamma 0.8, 16 tokens a canvas: throughput over AR, drawn as if it were tokens per
forward."""


def markdown(report: dict) -> str:
    """All settings, one per line, then exact match per family at the published setting, then the ablations."""
    ar = report["ar"]
    lines = [
        f"{report['questions']} held-out questions, {report['families']} families, greedy, through the vLLM engine; "
        f"held-out prose {report['bits_per_byte']} bits per byte (AR).",
        "",
        "| decoding | exact match | of AR's | tokens per denoise pass | tokens per forward | unfinished |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        _line("ar", ar, ar),
        _line("self-speculation", report["self_speculation"], ar),
    ]
    lines += [_line(f"gamma {r['gamma']}, T {r['max_steps']}", r, ar) for r in report["mask_diffusion"]]
    published = at_published(report)
    lines += ["", "| family | ar | gamma 0.8, T 16 |", "| --- | ---: | ---: |"]
    lines += [f"| {f} | {_percent(e)} | {_percent(published['exact'][f])} |" for f, e in ar["exact"].items()]
    if report["ablations"]:
        lines += ["", f"Plain-torch reference, {report['ablation_questions']} questions, gamma 0.8:", ""]
        lines += ["| ablation | exact match | tokens per forward |", "| --- | ---: | ---: |"]
        lines += [
            f"| {r['name']} | {_percent(r['exact']['overall'])} | {r['tokens_per_forward']:.2f} |"
            for r in report["ablations"]
        ]
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _line(title: str, row: dict, ar: dict) -> str:
    per_pass = row["tokens_per_denoise_pass"]
    retained = row["exact"]["overall"] / ar["exact"]["overall"] if ar["exact"]["overall"] else 0.0
    return (
        f"| {title} | {_percent(row['exact']['overall'])} | {_percent(retained)} | "
        f"{f'{per_pass:.2f}' if per_pass else ''} | {row['tokens_per_forward']:.2f} | {row['unfinished']} |"
    )


def at_published(report: dict) -> dict:
    """The row at gamma 0.8, T 16."""
    return next(r for r in report["mask_diffusion"] if (r["gamma"], r["max_steps"]) == (0.8, 16))


def picture(report: dict, out: pathlib.Path) -> None:
    """Quality retained against tokens per forward, one curve per T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    ar = report["ar"]["exact"]["overall"] or 1.0
    for max_steps in sorted({r["max_steps"] for r in report["mask_diffusion"]}, reverse=True):
        rows = [r for r in report["mask_diffusion"] if r["max_steps"] == max_steps]
        x, y = [r["tokens_per_forward"] for r in rows], [100 * r["exact"]["overall"] / ar for r in rows]
        axis.plot(x, y, marker="o", label=f"at most {max_steps} passes a canvas")
        if max_steps == 16:
            for row, at in zip(rows, zip(x, y, strict=True), strict=True):
                axis.annotate(f"γ {row['gamma']}", at, textcoords="offset points", xytext=(4, 5), fontsize=8)
    axis.plot([1], [100], "k^", label="AR")
    speculation = report["self_speculation"]
    axis.plot(
        [speculation["tokens_per_forward"]],
        [100 * speculation["exact"]["overall"] / ar],
        "gD",
        label="self-speculation: AR's own tokens",
    )
    axis.plot(
        [PUBLISHED["speed"]],
        [100 * PUBLISHED["quality_retained"]],
        "r*",
        markersize=14,
        label="published for the 30B model (98.7 % at 2.42×)",
    )
    axis.set(
        xlabel="tokens per forward (of either tower, prompts left out)",
        ylabel="exact match, % of AR's",
        title=f"Demo model, {report['questions']} held-out questions",
        ylim=(0, 108),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
