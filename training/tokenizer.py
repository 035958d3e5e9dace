"""The bundled model's tokenizer: byte-level BPE, like GPT-2's, learned from the corpus."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from corpus import END, WORLD, texts

_VOCABULARY = 2048
_TEXTS = 60_000


def train_tokenizer() -> Tokenizer:
    """Returns a tokenizer in which every common word, with the space before it, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every word of the world once more, so that none is too rare for a token of its own.
    words = [f" {word}" for word in json.dumps(WORLD, ensure_ascii=False).split('"')] * 5
    tokenizer.train_from_iterator(
        itertools.chain(itertools.islice(texts(seed=0), _TEXTS), words), trainer
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes a tokenizer as Transformers reads it.

    Args:
        tokenizer: the tokenizer.
        folder: where to.
        context: the most tokens that the model takes.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_prefix_space": False,
        "bos_token": END,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
