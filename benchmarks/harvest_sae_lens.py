"""SAELens' cache runner on the model and tokens of `harvest.py`, in an environment of its own."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

import torch
from sae_lens import cache_activations_runner
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
from sae_lens.training import activations_store
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

ROUNDS = 3


def tokenizer() -> PreTrainedTokenizerFast:
    """One with so many words. The rows are token ids already."""
    words = {"<s>": 0, **{f"w{number}": number for number in range(1, 50257)}}
    inner = Tokenizer(WordLevel(words, unk_token="<s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="<s>",
        pad_token="<s>",
        name_or_path=f"{sys.argv[1]}/model",
    )


def hooked(*args: Any, **kwargs: Any) -> HookedTransformer:
    """SAELens' own model, of the same size. What its weights are takes no time."""
    config = HookedTransformerConfig(
        n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_mlp=3072, d_vocab=50257,
        act_fn="gelu_new", normalization_type="LN", device="cpu",
    )  # fmt: skip
    return HookedTransformer(config, tokenizer=tokenizer())


def taken(folder: str, kind: str, hook: str, tokens: int) -> list[float]:
    times = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as out:
            config = CacheActivationsRunnerConfig(
                dataset_path=f"{folder}/data", model_name=f"{folder}/model",
                model_class_name=kind, model_batch_size=8, hook_name=hook, d_in=768,
                training_tokens=tokens, context_size=128, new_cached_activations_path=f"{out}/a",
                shuffle=False, dtype="float32", device="cpu", prepend_bos=False, streaming=False,
                # It runs whole buffers, whatever is asked for: one that holds all of it.
                buffer_size_gb=(tokens * 768 * 4 + 1) / 1e9,
            )  # fmt: skip
            runner = CacheActivationsRunner(config)
            before = time.process_time(), time.perf_counter()
            made = runner.run()
            after = time.process_time(), time.perf_counter()
            rows = len(made) * 128
            if rows != tokens:
                raise SystemExit(f"SAELens has made {rows} rows of {tokens}")
            times.append((after[0] - before[0], after[1] - before[1]))
    return [statistics.median(one) for one in zip(*times, strict=True)]


def main() -> None:
    folder, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    tokenizer().save_pretrained(f"{folder}/model")
    # It asks the Hub which tokenizer the data set was made with.
    activations_store.validate_pretokenized_dataset_tokenizer = lambda *_, **__: None
    found = {"its Hugging Face loader": taken(
        folder, "AutoModelForCausalLM", "transformer.h.5", tokens
    )}  # fmt: skip
    cache_activations_runner.load_model = hooked
    found["its own model"] = taken(folder, "HookedTransformer", "blocks.5.hook_resid_post", tokens)
    print(json.dumps([version("sae-lens"), found]))


if __name__ == "__main__":
    main()
