"""The trained weights as a checkpoint in the released layout, with its tokenizer, and the curves of its training."""

import json
import pathlib

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tools.demo_training.config import MODEL
from tools.demo_training.item import PROMPT_END

KEPT_FP32 = ("A_log", "e_score_correction_bias")
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 2048,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "mask_token": "<mask>",
    "chat_template": "{{ bos_token }}{{ messages | map(attribute='content') | join(' ') }}"
    "{% if add_generation_prompt %}{{ " + json.dumps(PROMPT_END) + " }}{% endif %}",
}


def export(state: pathlib.Path, tokenizer: Tokenizer, out: pathlib.Path) -> None:
    """Write the checkpoint of a state file into ``out``; weights in bf16."""
    saved = torch.load(state, weights_only=True)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        n: t.to(torch.float32 if n.endswith(KEPT_FP32) else torch.bfloat16).contiguous()
        for n, t in saved["weights"].items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", MODEL),
        ("generation_config.json", SPECIAL_IDS),
        ("tokenizer_config.json", TOKENIZER),
    ):
        (out / name).write_text(json.dumps(content, indent=1) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    log = saved["progress"]["log"]
    (out / "training_log.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in log) + "\n]\n")


def plot_curves(log: list[dict], out: pathlib.Path) -> None:
    """Loss and held-out exact match over the steps of both phases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for phase, exact in (("context", "ar"), ("denoiser", "diffusion")):
        losses = [row for row in log if row["phase"] == phase and "loss" in row]
        axes[0].plot([r["step"] for r in losses], [r["loss"] for r in losses], label=f"{phase} tower")
        checks = [row for row in log if row["phase"] == phase and exact in row]
        axes[1].plot([r["step"] for r in checks], [100 * r[exact]["overall"] for r in checks], marker=".", label=exact)
    axes[0].set(xlabel="step", ylabel="cross-entropy, nats per scored token", title="Training loss")
    axes[1].set(xlabel="step", ylabel="held-out answers exactly right, %", title="Held-out tasks", ylim=(0, 100))
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    pyplot.close(figure)
