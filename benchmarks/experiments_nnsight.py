"""The experiments with nnsight, in an environment of its own. Run by `experiments.py`."""

from __future__ import annotations

import nnsight
import torch
from peers import Cases, tell
from plain import logits
from subjects import HEADS, LENGTH, STEERED, STRENGTHS, gpt2, numbers, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

# It wants a tokenizer, although it is given tokens.
words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")
module = gpt2()
model = nnsight.TransformersModel(module, tokenizer=tokenizer, task="text-generation")
blocks, head = model.transformer.h, model.lm_head
projections = [block.attn.c_proj for block in blocks]
clean_ids, ids = tokens(module, LENGTH, 1), tokens(module, LENGTH, 2)
torch.set_grad_enabled(False)


def bare() -> list[torch.Tensor]:
    return [logits(module, ids)]


def sweep() -> Cases:
    def collected() -> list[torch.Tensor]:
        with model.trace(clean_ids, use_cache=False):
            clean = nnsight.save([block.output for block in blocks])
        return clean

    def a_trace_each() -> list[torch.Tensor]:
        clean, kept = collected(), []
        for block, donor in zip(blocks, clean, strict=True):
            for position in range(LENGTH):
                with model.trace(ids, use_cache=False):
                    block.output[:, position] = donor[:, position]
                    last = nnsight.save(head.output[0, -1].clone())
                kept.append(last)
        return kept

    def a_trace_per_layer() -> list[torch.Tensor]:
        clean, kept = collected(), []
        for block, donor in zip(blocks, clean, strict=True):
            with model.trace(use_cache=False) as tracer:
                found = nnsight.save([])
                for position in range(LENGTH):
                    with tracer.invoke(ids):
                        block.output[:, position] = donor[:, position]
                        found.append(head.output[0, -1].clone())
            kept.extend(found)
        return kept

    def one_trace() -> list[torch.Tensor]:
        clean = collected()
        with model.trace(use_cache=False) as tracer:
            kept = nnsight.save([])
            for block, donor in zip(blocks, clean, strict=True):
                for position in range(LENGTH):
                    with tracer.invoke(ids):
                        block.output[:, position] = donor[:, position]
                        kept.append(head.output[0, -1].clone())
        return kept

    return {
        "bare": bare,
        "a trace each": a_trace_each,
        "a trace per layer": a_trace_per_layer,
        "one trace": one_trace,
    }


def heads() -> Cases:
    width = module.config.n_embd // HEADS
    slices = [slice(at * width, (at + 1) * width) for at in range(HEADS)]

    def a_trace_per_layer() -> list[torch.Tensor]:
        with model.trace(clean_ids, use_cache=False):
            clean = nnsight.save([projection.input for projection in projections])
        kept = []
        for projection, donor in zip(projections, clean, strict=True):
            with model.trace(use_cache=False) as tracer:
                found = nnsight.save([])
                for single in slices:
                    with tracer.invoke(ids):
                        projection.input[:, :, single] = donor[:, :, single]
                        found.append(head.output[0, -1].clone())
            kept.extend(found)
        return kept

    return {"bare": bare, "a trace per layer": a_trace_per_layer}


def steering() -> Cases:
    vector = numbers(module.config.n_embd, seed=4)

    def one_trace() -> list[torch.Tensor]:
        with model.trace(use_cache=False) as tracer:
            kept = nnsight.save([])
            for strength in STRENGTHS:
                with tracer.invoke(clean_ids):
                    blocks[STEERED].output[:] += strength * vector
                    kept.append(head.output[0, -1].clone())
        return kept

    return {"bare": bare, "one trace": one_trace}


def lens() -> Cases:
    def one_trace() -> list[torch.Tensor]:
        with model.trace(clean_ids, use_cache=False):
            kept = nnsight.save([])
            for block in blocks:
                kept.append(head(model.transformer.ln_f(block.output[:, -1]))[0])
        return kept

    return {"bare": bare, "one trace": one_trace}


if __name__ == "__main__":
    tell(
        "nnsight",
        {
            "sweep 12 x 16": sweep,
            "heads 12 x 12": heads,
            "steering": steering,
            "logit lens": lens,
        },
    )
