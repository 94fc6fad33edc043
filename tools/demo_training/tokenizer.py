"""The demo model's tokenizer: byte-level BPE, digits one by one, the mask at id 3."""

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools.demo_training.tasks import FAMILIES, instances
from tools.demo_training.tasks.words import ALL, CITIES, COLOURS, LETTERS, NAMES
from tools.demo_training.text import documents
from vllm_twotower.core import MASK_TOKEN_ID

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<mask>"]
BOS, EOS = 1, 2


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """On tasks, prose and code in comparable amounts; task words and single letters are whole by repetition."""
    rng = random.Random(0)
    texts = [t for kind in documents(held_out=False).values() for t in rng.sample(kind, min(len(kind), 1500))]
    for family in FAMILIES:
        source = instances(family, seed=10**6, held_out=False)
        texts += [item.prompt + item.answer for _, item in zip(range(500), source, strict=False)]
    letters = " ".join([*LETTERS, *LETTERS.upper()])
    quoted = " ".join(f'"{word}"' for word in [*NAMES, *COLOURS, *CITIES])
    texts += [" " + " ".join(ALL), f" {letters}", quoted] * 2000
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id("<mask>") == MASK_TOKEN_ID
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer
