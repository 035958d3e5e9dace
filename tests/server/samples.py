"""Jobs of many kinds for a small model, with what they give without a server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import InsituError, Job, LanguageModel

CLOSE = 1e-5
_VOCABULARY, _WIDTH = 4_000, 128


@dataclass(frozen=True, slots=True)
class Sample:
    """A job and what it gives.

    Attributes:
        job: the job.
        body: its bytes.
        tensors: all tensors of its results, by name.
        has_blobs: whether a client sends tensors of it apart.
    """

    job: Job
    body: bytes
    tensors: dict[str, torch.Tensor]
    has_blobs: bool


def small_model(folder: Path, layers: int = 3, seed: int = 0) -> None:
    """Writes a GPT-2 with random weights.

    Args:
        folder: the folder for it.
        layers: how many layers it has.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=_WIDTH, n_layer=layers, n_head=4, vocab_size=_VOCABULARY, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).eval().save_pretrained(folder)


def samples(folder: Path, of_each: int = 2) -> list[Sample]:
    """Returns jobs of each kind, with the model in a folder.

    Args:
        folder: the folder.
        of_each: how many of each kind.
    """
    model = LanguageModel(str(folder))
    return [_sample(model, kind, number) for number in range(of_each) for kind in KINDS]


def agrees(data: bytes, sample: Sample) -> bool:
    """Returns whether results are those of a run without a server.

    Args:
        data: the bytes of the results.
        sample: the job.
    """
    found = safetensors.torch.load(data)
    return found.keys() == sample.tensors.keys() and all(
        found[name].dtype == one.dtype
        and found[name].shape == one.shape
        and torch.allclose(found[name], one, rtol=CLOSE, atol=CLOSE)
        for name, one in sample.tensors.items()
    )


def _ids(number: int, count: int = 12) -> torch.Tensor:
    """A prompt of ids: of three lengths, as each new one takes a while to be looked at."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(1, _VOCABULARY, (1, count + 4 * (number % 3)), generator=generator)


def _reads(model: LanguageModel, number: int) -> Job:
    with model.trace(_ids(number)) as tracer:
        model.transformer.h[1].output[0].save("hidden")
        model.lm_head.output[0, -1].topk(5).indices.save("top")
    return tracer.job


def _steers(model: LanguageModel, number: int) -> Job:
    with model.trace(_ids(number)) as tracer:
        model.transformer.h[0].output[0][:] += torch.linspace(-1, 1, _WIDTH)
        model.lm_head.output[0, -1].save("logits")
    return tracer.job


def _steers_with_a_matrix(model: LanguageModel, number: int) -> Job:
    matrix = torch.randn(_WIDTH, 600, generator=torch.Generator().manual_seed(number))
    with model.trace(_ids(number)) as tracer:
        (model.transformer.h[0].output[0] @ matrix).amax(-1).save("features")
    return tracer.job


def _sweeps(model: LanguageModel, number: int) -> Job:
    ids = _ids(number)
    with model.trace() as tracer:
        for place in range(16):
            with tracer.invoke(ids):
                layer, head = place % 3, place % 4
                model.transformer.h[layer].attn.output[0][..., head::4] = 0.0
                model.lm_head.output[0, -1].save(f"logits-{place}")
    return tracer.job


def _generates(model: LanguageModel, number: int) -> Job:
    with model.generate(_ids(number), max_new_tokens=12, do_sample=False) as tracer:
        model.transformer.h[2].output[0][:, -1].save("hidden")
    return tracer.job


def _is_large(model: LanguageModel, number: int) -> Job:
    with model.trace(_ids(number).repeat(24, 1)) as tracer:
        model.lm_head.output.save("logits")
    return tracer.job


def _differentiates(model: LanguageModel, number: int) -> Job:
    with model.trace(_ids(number)) as tracer:
        hidden = model.transformer.h[1].output[0]
        hidden.grad.save("gradient")
        model.lm_head.output[0, -1, 7].backward()
    return tracer.job


def _is_a_session(model: LanguageModel, number: int) -> Job:
    with model.session() as session:
        with model.trace(_ids(number)):
            hidden = model.transformer.h[0].output[0]
        with model.trace(_ids(number)):
            model.transformer.h[0].output[0][:] = hidden * 2
            model.lm_head.output[0, -1].save("logits")
    return session.job


def _fails(model: LanguageModel, number: int) -> Job:
    with suppress(InsituError), model.trace() as tracer:
        with tracer.invoke(_ids(number)):
            model.lm_head.output[0, -1].save("logits")
        with tracer.invoke(_ids(number + 1)):
            hidden = model.transformer.h[0].output[0].flatten()
            hidden[(hidden > 1e9).nonzero()[0]].save("missing")
    return tracer.job


KINDS: tuple[Callable[[LanguageModel, int], Job], ...] = (
    _reads, _steers, _steers_with_a_matrix, _sweeps, _generates, _is_large, _differentiates,
    _is_a_session, _fails,
)  # fmt: skip


def _sample(model: LanguageModel, kind: Callable[[LanguageModel, int], Job], number: int) -> Sample:
    job = kind(model, number)
    found = safetensors.torch.load(model.run(job, raises=False).to_bytes())
    return Sample(job, job.to_bytes(), found, kind is _steers_with_a_matrix)
