"""What type checkers are told is what there is. What they make of it is in `typing_tests/`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import insitu
from insitu import LanguageModel
from insitu.graph.answers import Answers
from insitu.graph.operations import TENSOR_METHODS
from insitu.models.delegation import DELEGATED
from insitu.models.vocabulary import Names
from insitu.tracing import block_types, handle, handles

ROOT = Path(__file__).parents[1]
SOURCE = Path(insitu.__file__).parent


def declared(file: str, name: str) -> set[str]:
    """The names that a class declares, with those for type checkers alone."""
    tree = ast.parse((SOURCE / file).read_text())
    (found,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name
    ]
    names: set[str] = set()
    for node in ast.walk(found):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


def test_the_methods_of_proxies_are_those_of_the_registry() -> None:
    attributes = {"values", "indices", "T", "H", "mT", "mH", "real", "imag"}
    methods = {one.short for one in TENSOR_METHODS if not one.short.endswith("_")}
    found = declared("graph/tensor_methods.py", "TensorMethods")
    assert found - attributes == methods - vars(Answers).keys()


def test_what_a_model_does_as_its_module_is_declared() -> None:
    assert declared("models/delegation.py", "ActsAsModule") == DELEGATED


def test_every_standard_name_is_declared_and_no_other() -> None:
    of_blocks = {
        name
        for kind in ("TransformerBlock", "Attention", "MLP", "Experts", "ModelNames")
        for name in declared("tracing/block_types.py", kind)
    }
    of_models = declared("models/served_model.py", "ServedModel") & Names.names
    assert of_models == {"blocks", "encoder_blocks", "embedding", "final_norm", "unembedding"}
    assert of_blocks | of_models == Names.names


@pytest.mark.no_wire
def test_handles_have_the_declared_classes(gpt2: LanguageModel) -> None:
    block = gpt2.blocks[0]
    assert isinstance(gpt2.blocks, handles.Handles)
    for kind in (handle.Submodule, block_types.TransformerBlock):
        assert isinstance(block, kind) and isinstance(gpt2.transformer.h[0], kind)
    assert isinstance(block.attention, block_types.Attention)
    assert isinstance(block.mlp, block_types.MLP)
    assert not isinstance(gpt2, block_types.TransformerBlock)


@pytest.mark.no_wire
def test_notebooks_complete_the_names_of_a_block(gpt2: LanguageModel) -> None:
    block = gpt2.blocks[0]
    assert {"residual_mid", "attention", "mlp", "attn", "output"} <= set(dir(block))
    assert {"pattern", "z", "W_Q", "c_proj"} <= set(dir(block.attention))
    assert "cross_attention" not in dir(block)  # declared, and not there


def test_every_typing_test_has_slips_that_must_be_errors() -> None:
    files = sorted((ROOT / "typing_tests").glob("*.py"))
    assert len(files) >= 5
    for file in files:
        text = file.read_text()
        assert "assert_type(" in text and "# type: ignore[" in text, file.name
        for line in text.splitlines():  # for both checkers, or for neither
            assert ("# type: ignore[" in line) == ("# pyright: ignore[" in line), line
