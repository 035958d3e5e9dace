"""What a client makes of a server's model: the same model without weights, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from insitu import InsituError, LanguageModel, LoadError, OptionError
from insitu.engine.fingerprint import other_habits, other_structure, other_weights
from insitu.remote import skeletons
from insitu.remote.protocol import Skeleton
from insitu.remote.skeletons import (
    checked_files,
    digest_of,
    skeleton_folder,
    skeleton_from_bytes,
    skeleton_of,
    skeleton_to_bytes,
)
from tests.conftest import tiny_gpt2

pytestmark = pytest.mark.no_wire
CONFIG = json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}).encode()
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def gpt2() -> Any:
    return tiny_gpt2()


def llama() -> Any:
    scaled = {"rope_theta": 5000.0, "rms_norm_eps": 1e-5, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=90, tie_word_embeddings=True, **SIZES, **scaled))


def t5() -> Any:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    sizes |= {"vocab_size": 90, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes))


def bert() -> Any:
    return BertForMaskedLM(BertConfig(vocab_size=90, **SIZES))


def headless() -> Any:
    return GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=90))


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2, "llama": llama, "t5": t5, "bert": bert, "headless": headless,
}  # fmt: skip


def saved(kind: str, folder: Path, tokenizer: Any = None, dtype: Any = torch.float32) -> str:
    torch.manual_seed(0)
    module = MODELS[kind]().to(dtype)
    module.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def made(skeleton: Skeleton) -> LanguageModel:
    """What a client makes, on a machine that the server's files are not on."""
    travelled = skeleton_from_bytes(skeleton_to_bytes(skeleton))
    folder = skeleton_folder(travelled)
    dtype = getattr(torch, travelled.dtype)
    return LanguageModel(folder, dtype=dtype, local_files_only=True)


def check_same(server: LanguageModel, client: LanguageModel) -> None:
    there, here = server.described.fingerprint, client.described.fingerprint
    assert other_structure(here, there) == other_weights(here, there) == []
    assert other_habits(here, there, None) == []
    # What is known only with weights; and of a config in memory, what only those of files have.
    unknown: dict[str, Any] = {"dtypes": (), "generation": None, "settings": {}}
    assert msgspec.structs.replace(here, **unknown) == msgspec.structs.replace(there, **unknown)
    assert {**here.settings} == {"model_type": here.settings["model_type"], **there.settings}
    assert not here.dtypes or not there.dtypes or [*here.dtypes] == [*there.dtypes]
    assert not client.loaded


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_client_makes_the_same_model(kind: str, with_tokenizer: bool, tmp_path: Path) -> None:
    tokenizer = LanguageModel("insitu/eiffel").tokenizer if with_tokenizer else None
    server = LanguageModel(saved(kind, tmp_path / "model", tokenizer))
    client = made(skeleton_of(server))
    check_same(server, client)
    server.load()
    check_same(server, made(skeleton_of(server)))
    if tokenizer is not None:
        text = "The Eiffel Tower"
        assert client.tokenizer(text).input_ids == tokenizer(text).input_ids
    elif kind not in ("t5", "bert"):  # of those, Transformers makes one out of nothing
        with pytest.raises(LoadError, match="no tokenizer"):
            client.tokenizer  # noqa: B018


def test_the_bundled_model_is_made() -> None:
    server = LanguageModel("insitu/eiffel")
    skeleton = skeleton_of(server)
    assert (skeleton.model, skeleton.dtype, skeleton.task) == ("insitu/eiffel", "float32", "")
    client = made(skeleton)
    check_same(server, client)
    with client.scan("The Eiffel Tower is in the city of") as tracer:
        logits = client.lm_head.output[0, -1].save("logits")
    assert logits.shape == (1336,)
    results = server.run(tracer.job)
    assert server.tokenizer.decode(results["logits"].argmax()) == " Paris"


def test_a_model_in_memory_and_one_in_another_dtype_are_made(tmp_path: Path) -> None:
    server = LanguageModel(tiny_gpt2())
    check_same(server, made(skeleton_of(server, "tiny")))
    assert skeleton_of(server, "tiny").model == "tiny"
    place = saved("llama", tmp_path / "llama", dtype=torch.float32)
    server = LanguageModel(place, dtype=torch.bfloat16)
    assert skeleton_of(server).dtype == "bfloat16"
    client = made(skeleton_of(server))
    check_same(server, client)
    assert {str(weight.dtype) for weight in client.module.parameters()} == {"torch.bfloat16"}
    assert skeleton_of(server).model == "llama"  # and not the folders around it


def test_the_class_is_the_one_that_the_server_has(tmp_path: Path) -> None:
    """Also where the config names another, or none."""
    place = Path(saved("gpt2", tmp_path / "model"))
    config = json.loads((place / "config.json").read_text())
    del config["architectures"]
    (place / "config.json").write_text(json.dumps(config))
    server = LanguageModel(place, task="causal")
    check_same(server, made(skeleton_of(server)))


def test_what_generations_take_is_read_from_the_files_too(tmp_path: Path) -> None:
    place = Path(saved("gpt2", tmp_path / "model"))
    (place / "generation_config.json").write_text(json.dumps({"top_k": 7, "eos_token_id": 3}))
    server = LanguageModel(place)
    for _ in range(2):  # without weights, and with them
        settings = json.loads(skeleton_of(server).files["generation_config.json"])
        assert (settings["top_k"], settings["eos_token_id"]) == (7, 3)
        server.load()


def test_a_chat_template_travels(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        skeleton_folder(skeleton_of(LanguageModel("insitu/eiffel")))
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    server = LanguageModel(saved("gpt2", tmp_path / "model", tokenizer))
    client = made(skeleton_of(server))
    chat = [{"role": "user", "content": "The Eiffel Tower"}]
    expected = server.tokenizer.apply_chat_template(chat, tokenize=False)
    assert client.tokenizer.apply_chat_template(chat, tokenize=False) == expected


def test_nothing_of_the_servers_machine_travels(tmp_path: Path) -> None:
    tokenizer = LanguageModel("insitu/eiffel").tokenizer
    server = LanguageModel(saved("gpt2", tmp_path / "secret", tokenizer))
    skeleton = skeleton_of(server, "tiny")
    assert str(tmp_path).encode() not in skeleton_to_bytes(skeleton)
    assert not [name for name in skeleton.files if name.endswith((".safetensors", ".py"))]


def test_a_skeleton_is_the_same_every_time() -> None:
    server = LanguageModel("insitu/eiffel")
    first, second = (skeleton_to_bytes(skeleton_of(server)) for _ in range(2))
    assert first == second and digest_of(first) == digest_of(second)


def test_classes_that_only_code_can_make_are_refused() -> None:
    class Own(GPT2LMHeadModel):
        pass

    with pytest.raises(OptionError, match="make a Own, which is no class of Transformers"):
        skeleton_of(LanguageModel(Own(GPT2Config(n_embd=16, n_layer=1, n_head=4)).eval()))


BAD_NAMES = [
    *("../config.json", "/etc/passwd", "a/config.json", "modeling.py", "model.safetensors", ""),
    *("pytorch_model.bin", "tokenizer.pkl", "config.json\x00", ".", "adapter_config.json"),
    *("chat_template.jinja/..", "C:\\config.json", "model.safetensors.index.json", "x" * 10_000),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_files_of_other_names_are_refused(name: str, tmp_path: Path) -> None:
    skeleton = Skeleton("m", {"config.json": CONFIG, name: b"{}"}, "float32")
    with pytest.raises(LoadError, match="has a file"):
        skeleton_folder(skeleton, tmp_path)
    assert os.listdir(tmp_path) == []


HOSTILE: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "auto_map": {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "modeling.Own"},
    "trust_remote_code": True,
    "attn_implementation": "evil/kernels",
    "_attn_implementation": "evil/kernels",
    "_attn_implementation_internal": "evil/kernels",
    "experts_implementation": "evil/kernels",
    "name_or_path": "evil/repository",
    "_name_or_path": "evil/repository",
    "use_kernels": True,
    "dtype": "load",
    "torch_dtype": ["load"],
    "text_config": {"auto_map": {"AutoConfig": "x--y.z"}, "n_layer": 2},
    "layers": [{"custom_generate": "evil/repository", "kept": 1}],
    "n_layer": 2,
}


def test_what_names_code_or_files_is_left_out_of_configs() -> None:
    files = checked_files(Skeleton("m", {"config.json": json.dumps(HOSTILE).encode()}, "float16"))
    found = json.loads(files["config.json"])
    assert found == {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float16",
        "text_config": {"n_layer": 2},
        "layers": [{"kept": 1}],
        "n_layer": 2,
    }


def test_what_names_code_or_files_is_left_out_of_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret words")
    hostile = {
        "auto_map": {"AutoTokenizer": ["tokenization.Own", None]},
        "vocab_file": str(tmp_path / "secret.txt"),
        "tokenizer_file": "/etc/passwd",
        "init_inputs": ["/etc/passwd"],
        "name_or_path": "evil/repository",
        "tokenizer_class": "ATokenizerOfALaterVersion",
        "bos_token": "<s>",
    }
    good = skeleton_of(LanguageModel("insitu/eiffel"))
    files = {**good.files, "tokenizer_config.json": json.dumps(hostile).encode()}
    skeleton = Skeleton("m", files, "float32")
    found = json.loads(checked_files(skeleton)["tokenizer_config.json"])
    assert found == {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    client = made(skeleton)
    assert client.tokenizer("The Eiffel Tower").input_ids


def bad_contents() -> dict[str, bytes]:
    return {
        "no JSON": b"config",
        "no object": b"[]",
        "no text": b"\xff\xfe\x00",
        "nested": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        "nested less": b'{"a":' * 30 + b"1" + b"}" * 30,
        "huge": b'{"a": "' + b"x" * (9 * 2**20) + b'"}',
    }


@pytest.mark.parametrize("what", bad_contents())
def test_configs_that_are_none_are_refused(what: str, tmp_path: Path) -> None:
    bad = bad_contents()[what]
    for files in ({"config.json": bad}, {"config.json": CONFIG, "tokenizer_config.json": bad}):
        with pytest.raises(LoadError):
            skeleton_folder(Skeleton("m", files, "float32"), tmp_path)
    assert os.listdir(tmp_path) == []


def test_sizes_and_dtypes_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("load", "int8", "", "torch.float32"):
        with pytest.raises(LoadError, match="dtype"):
            checked_files(Skeleton("m", {"config.json": CONFIG}, dtype))
    with pytest.raises(LoadError, match="no config"):
        checked_files(Skeleton("m", {}, "float32"))
    monkeypatch.setattr(skeletons, "MOST_BYTES", 1000)
    with pytest.raises(LoadError, match="over 1,000 bytes"):
        checked_files(Skeleton("m", {"config.json": CONFIG, "merges.txt": b"x" * 1000}, "float32"))
    with pytest.raises(ValueError, match="bytes"):
        skeleton_from_bytes(b"x" * 1001)


def test_bytes_that_are_no_skeleton_are_refused() -> None:
    other = msgspec.msgpack.encode({"model": 3})
    for data in (b"", b"\xc0", b"\x91" * 10**5, other, pickle.dumps([1, 2])):
        with pytest.raises(ValueError):
            skeleton_from_bytes(data)


def test_a_config_that_makes_no_model_is_an_error_of_insitu() -> None:
    hostile = [
        {"model_type": "no_such_model"},
        {"auto_map": {"AutoConfig": "x.Y"}},
        {"model_type": "detr", "use_pretrained_backbone": True, "backbone": "evil/x"},
    ]
    for config in hostile:
        skeleton = Skeleton("m", {"config.json": json.dumps(config).encode()}, "float32")
        folder = skeleton_folder(skeleton)
        with pytest.raises(InsituError):
            LanguageModel(folder, local_files_only=True)


def test_what_names_files_is_left_out_of_special_tokens(tmp_path: Path) -> None:
    good = skeleton_of(LanguageModel("insitu/eiffel"))
    hostile = {"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd", "bos_token": "<s>"}
    files = {**good.files, "special_tokens_map.json": json.dumps(hostile).encode()}
    found = checked_files(Skeleton("m", files, "float32"))["special_tokens_map.json"]
    assert json.loads(found) == {"bos_token": "<s>"}


@pytest.mark.parametrize("name", ["n_layer", "num_hidden_layers", "num_local_experts", "depth"])
def test_a_config_has_no_more_layers_than_any_model(name: str) -> None:
    for sizes in ({name: 10**8}, {"text_config": {name: 10**8}}):
        config = {**json.loads(CONFIG), **sizes}
        with pytest.raises(LoadError, match="100,000,000"):
            checked_files(Skeleton("m", {"config.json": json.dumps(config).encode()}, "float32"))
