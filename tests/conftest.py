"""Models that the tests share. All are made on the spot or shipped; nothing is downloaded."""

import gc
import logging
import os
import tempfile
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Proofs of names are of today's code, and are no business of whoever runs the tests.
os.environ.setdefault("INSITU_PROOFS", tempfile.mkdtemp(prefix="insitu-proofs-"))

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from insitu import LanguageModel, Model
from tests.round_trip import round_trip  # noqa: F401

torch.set_num_threads(1)


# One of each kind of model: decoders with and without grouped heads, softcaps and sliding windows,
# parallel blocks, experts, a state space, an encoder, and an encoder with a decoder.
USUAL = frozenset(["gpt2", "llama", "gemma2", "gpt-neox", "mixtral", "mamba", "bert", "t5"])
# Of these, `make test` runs those that share the least code. Encoders with a decoder are in
# tests/models/test_encoder_decoder.py too. CI runs the others.
FEW = USUAL - {"gemma2", "gpt-neox", "mixtral", "t5"}
MANY = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves a few models of tests that go over all architectures; others are slow or thorough.

    What a change breaks, it breaks in one of the usual kinds nearly always. `make test` runs a few
    of these, CI all of them, and `make test-all` and `make architectures` the rest too.
    """
    from tests.fidelity.zoo import ZOO  # of use only here, and not quickly imported

    of_function: dict[tuple[str, str], list[tuple[pytest.Item, str]]] = {}
    for item in items:
        spec = getattr(item, "callspec", None)
        for value in () if spec is None else spec.params.values():
            if isinstance(value, str) and value in ZOO:
                key = item.nodeid.partition("[")[0], item.path.name
                of_function.setdefault(key, []).append((item, value))
    for found in of_function.values():
        if len({name for _, name in found}) > MANY:
            for item, name in found:
                if name not in USUAL:
                    item.add_marker(pytest.mark.slow)
                elif name not in FEW:
                    item.add_marker(pytest.mark.thorough)


def pytest_collection_finish() -> None:
    """Lets the garbage collector pass over what imports have made: it takes half a second."""
    gc.collect()
    gc.freeze()


class _Faults(logging.Handler):
    """Keeps what Insitu logs as an error: exceptions of its own, which a trial survives."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def no_fault_is_survived() -> Iterator[_Faults]:
    """Fails a test in which a trial of the model met an exception of Insitu's own."""
    faults = _Faults()
    logger = logging.getLogger("insitu")
    logger.addHandler(faults)
    yield faults
    logger.removeHandler(faults)
    for record in faults.records:
        raise AssertionError(record.getMessage()) from (record.exc_info or (None, None))[1]


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=4, n_head=4, vocab_size=100, n_positions=40, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tiny_llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, max_position_embeddings=40, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def gpt2() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


@pytest.fixture
def llama() -> LanguageModel:
    return LanguageModel(tiny_llama())


@pytest.fixture(params=["gpt2", "llama"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


@pytest.fixture
def eiffel() -> LanguageModel:
    return LanguageModel("insitu/eiffel", device_map="cpu")


class Twice(nn.Module):
    """Calls a module twice, takes a keyword and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.output = nn.ReLU()  # a name that a handle has too

    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        first = self.shared(x)
        return {"first": first, "second": self.output(self.shared(first)) * scale}


@pytest.fixture
def twice() -> Model:
    torch.manual_seed(0)
    return Model(Twice())


def hooked(module: nn.Module, path: str, *args: object, **kwargs: object) -> object:
    """The oracle: what a plain PyTorch hook sees at a module's first call."""
    seen: list[object] = []
    handle = module.get_submodule(path).register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0]


def hooked_hidden(
    module: nn.Module, path: str, ids: torch.Tensor, **kwargs: object
) -> torch.Tensor:
    """The oracle for a block's hidden states, on every version of Transformers."""
    output = hooked(module, path, input_ids=ids, use_cache=False, **kwargs)
    return output[0] if isinstance(output, tuple) else output
