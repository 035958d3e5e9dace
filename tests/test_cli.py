"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from typer.testing import CliRunner

import insitu
from insitu import LanguageModel, Results
from insitu.cli import app
from insitu.display.report import Check, Report
from insitu.methods import SteeringVector
from tests.conftest import tiny_gpt2, tiny_llama
from tests.display.pages import needs_chromium
from tests.thinning import sampled, thinned

pytestmark = pytest.mark.no_wire


PAGE = Path(__file__).parents[1] / "docs" / "command_line.md"
CLEAN, CORRUPTED = "The Louvre is in the city of", "The Kremlin is in the city of"

PATCH = "patch", "insitu/eiffel"


def run(*args: str, columns: int = 120) -> Any:
    return CliRunner().invoke(app, list(args), env={"COLUMNS": str(columns)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def test_the_bundled_model_is_checked() -> None:
    result = run("check", "insitu/eiffel")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "insitu/eiffel: GPT2LMHeadModel"
    assert "transformer.h[0-5]" in lines
    assert (
        "attention.pattern (2, 8, 7, 7) attn.ops.softmax[0].output, with eager attention" in lines
    )
    assert "final_norm transformer.ln_f: LayerNorm" in lines
    holds = lines[lines.index("In a run of the model") + 1 :]
    assert len(holds) == 8 and all(" OK " in line for line in holds)


def test_a_folder_is_checked_and_written_as_json(folder: Path) -> None:
    result = run("check", str(folder), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["sizes"]["n_layers"] == 3
    names = {one["name"]: one for one in report["parts"][1]["names"]}
    assert names["attention.k"]["shape"] == [2, 2, 7, 4]
    assert names["attention.k"]["stands_for"].startswith("model.layers[0].self_attn")
    assert {one["outcome"] for one in report["checks"]} == {"ok"}


def test_other_dtypes_are_loaded(folder: Path) -> None:
    result = run("check", str(folder), "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0
    allowed = {one["allowed"] for one in json.loads(result.stdout)["checks"] if one["allowed"]}
    assert max(allowed) > torch.finfo(torch.bfloat16).eps


@pytest.mark.thorough
def test_a_block_that_is_not_the_sum_of_its_parts_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    forward = GPT2Block.forward

    def lying(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if not isinstance(hidden, FakeTensor):
            with torch.no_grad():
                hidden.mul_(1.01)
        return output

    monkeypatch.setattr(GPT2Block, "forward", lying)
    result = run("check", str(tmp_path))
    assert result.exit_code == 1
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    differing = [line for line in lines if "DIFFERS" in line]
    assert differing[0].startswith("residuals add up DIFFERS transformer.h[0]: largest difference")
    assert run("check", str(tmp_path), "--json").exit_code == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "it is no folder with a model"),
        ({"config.json": "{"}, "it is no folder with a model"),
        ({"config.json": '{"model_type": "no-such-model"}'}, "it is no folder with a model"),
        ({"config.json": '{"model_type": "gpt2", "n_layer": 1}'}, "The weights of"),
    ],
)
def test_a_folder_without_a_model_is_said_in_a_line(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    result = run("check", str(tmp_path))
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [
        line for line in result.stderr.splitlines() if str(tmp_path) in line and said in line
    ]
    assert "Traceback" not in result.stderr


def test_a_repository_that_cannot_be_reached_is_said_in_a_line() -> None:
    result = run("check", "nobody/no-such-model")
    assert result.exit_code == 2
    assert "'nobody/no-such-model' cannot be loaded" in result.stderr


def test_models_of_all_kinds_are_opened(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        image_size=8, patch_size=4,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    result = run("check", str(tmp_path))
    assert result.exit_code == 0
    assert "residual_mid" in result.stdout


def test_a_model_that_cannot_be_opened_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": "many"}')
    result = run("check", str(tmp_path))
    assert result.exit_code == 2
    assert "cannot be loaded" in result.stderr and "Traceback" not in result.stderr


def test_help_has_an_example() -> None:
    result = run("check", "--help")
    assert result.exit_code == 0
    assert "insitu check insitu/eiffel" in result.stdout
    assert "--json" in result.stdout
    assert "check" in run("--help").stdout


def test_a_check_offers_no_server() -> None:
    # Width: a narrow terminal would cut names of options.
    offered = CliRunner().invoke(app, ["check", "--help"], env={"COLUMNS": "200"}).output
    assert "--device-map" in offered and "--remote" not in offered
    result = run("check", "insitu/eiffel", "--remote", "http://127.0.0.1:9")
    assert result.exit_code == 2 and "LoadError" not in result.output


COMMANDS = re.findall(r"```console\n\$ insitu ([^\n]+)\n(.*?)\n```", PAGE.read_text(), re.S)


@pytest.mark.parametrize(("line", "printed"), COMMANDS, ids=lambda text: text.split()[0])
def test_commands_of_the_page_print_what_it_says(line: str, printed: str) -> None:
    result = run(*shlex.split(line), columns=100)
    assert result.exit_code == 0
    assert [row.rstrip() for row in result.stdout.splitlines()] == printed.splitlines()


def test_every_command_has_help_with_an_example_that_is_one() -> None:
    for name in WRITTEN:
        text = " ".join(run(name, "--help").stdout.split())
        assert f"Example: insitu {name}" in text


def test_the_demo_prints_the_city_and_a_lens() -> None:
    result = run("demo")
    assert result.exit_code == 0
    assert result.stdout.startswith("'The Eiffel Tower is in the city of Paris'")
    assert "(1, 8, 128)" in result.stdout and "Logit lens" in result.stdout


@pytest.mark.thorough
def test_the_demo_written_to_a_page_still_says_the_city(tmp_path: Path) -> None:
    result = run("demo", "--html", str(tmp_path / "demo.html"))
    assert result.exit_code == 0 and "Logit lens" not in result.stdout
    assert result.stdout.startswith("'The Eiffel Tower is in the city of Paris'")
    told = json.loads(run("demo", "--json").stdout)
    assert told["hidden_states"] == [1, 8, 128]
    assert told["lens"]["texts"][-1] == " Paris"


def test_a_tree_is_shown_without_weights(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)  # there are no weights to load
    result = run("tree", str(tmp_path), "--depth", "2")
    assert result.exit_code == 0
    assert "LlamaForCausalLM" in result.stdout and "layers: ModuleList" in result.stdout


@pytest.mark.thorough
def test_a_patch_is_written_as_json() -> None:
    given = [*PATCH, CLEAN, CORRUPTED, "--answer", "Paris", "--instead", "Moscow"]
    result = run(*given, "--layers", "3-4", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [name for name, _ in found["axes"]] == ["layer", "position"]
    assert found["axes"][0][1] == ["3", "4"]
    assert found["values"][0][1] == pytest.approx(1.0, abs=0.05)  # the name carries all of it


STEER = "steer", "insitu/eiffel", CLEAN, "--toward", CORRUPTED, "--away", CLEAN, "--layers", "4"
PATCHED = *PATCH, CLEAN, CORRUPTED, "--answer", "Paris", "--instead", "Moscow", "--layers", "3"


def a_job() -> str:
    """A file with a job, which is there as long as the tests run."""
    model = LanguageModel("insitu/eiffel")
    with model.scan(CLEAN) as tracer:
        model.transformer.h[3].output.save("block")
        model.lm_head.output[0, -1].save("logits")
    path = Path(tempfile.mkdtemp(prefix="insitu-tests-")) / "experiment.job"
    path.write_bytes(tracer.job.to_bytes())
    return str(path)


def some_prompts() -> str:
    """A file with prompts, which is there as long as the tests run."""
    path = Path(tempfile.mkdtemp(prefix="insitu-tests-")) / "prompts.txt"
    path.write_text(f"{CLEAN} Paris\n{CORRUPTED} Moscow\n" * 5)
    return str(path)


JOB, PROMPTS = a_job(), some_prompts()
HARVEST = "harvest", "insitu/eiffel", PROMPTS, "--sites", "residual_out:3,mlp.post:1"
WRITTEN: dict[str, tuple[tuple[str, ...], str]] = {
    "demo": (("demo",), "Logit lens"),
    "tree": (("tree", "insitu/eiffel"), "final_norm"),
    "check": (("check", "insitu/eiffel"), "final_norm"),
    "lens": (("lens", "insitu/eiffel", CLEAN), "Logit lens"),
    "patch": (PATCHED, "Activation patching"),
    "attention": (("attention", "insitu/eiffel", CLEAN, "--layers", "4"), "Attention patterns"),
    "harvest": ((*HARVEST, "--tokens", "50", "--plan"), "forwards"),
    "run": (("run", JOB, "--model", "insitu/eiffel"), "logits"),
    "steer": ((*STEER, "--strength", "2", "--tokens", "1"), "Moscow"),
}


def test_every_command_is_among_those_that_are_written_to_files() -> None:
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert sorted(names) == sorted([*WRITTEN, "serve"])  # which answers over HTTP


@pytest.mark.parametrize("name", sampled(WRITTEN, ["tree", "lens", "run", "steer"]))
def test_every_command_writes_pages_and_json(name: str, tmp_path: Path) -> None:
    args, words = WRITTEN[name]
    page = tmp_path / "page.html"
    result = run(*args, "--html", str(page), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    text = page.read_text()
    assert text.lower().lstrip().startswith(("<!doctype html>", "<html")) and words in text
    assert not re.search(r"(src|href)=.?https?:|@import|url\(.?https?:", text.split("<script")[0])


@pytest.mark.thorough
@needs_chromium
@pytest.mark.parametrize("name", sampled(thinned(WRITTEN, ["tree", "lens", "patch"]), ["lens"]))
def test_every_command_writes_pngs(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    result = run(*WRITTEN[name][0], "--png", str(picture))
    assert result.exit_code == 0
    if name != "demo":
        assert result.stdout == ""
    with Image.open(picture) as image:
        assert image.format == "PNG"
        wide, high = image.size
        assert 100 < wide < 6000 and 60 < high < 6000
        levels = image.convert("L").histogram()
    assert sum(levels[:100]) and sum(levels[230:])  # something dark on something light


def test_a_job_is_run_and_its_results_are_written(tmp_path: Path) -> None:
    out = tmp_path / "results.safetensors"
    result = run("run", JOB, "--model", "insitu/eiffel", "--out", str(out))
    assert result.exit_code == 0 and "transformer.h[3].output" in result.stdout
    results = Results.load(out)
    model = LanguageModel("insitu/eiffel")
    assert model.tokenizer.decode(results["logits"].argmax()) == " Paris"
    assert isinstance(results["block"], tuple) and results["block"][0].shape == (1, 7, 128)


def test_a_job_is_checked_without_a_run(tmp_path: Path) -> None:
    out = tmp_path / "results.safetensors"
    result = run("run", JOB, "--model", "insitu/eiffel", "--out", str(out), "--check", "--json")
    assert result.exit_code == 0 and not out.exists()
    told = json.loads(result.stdout)
    assert told["passes"] == 1 and told["result_bytes"] == 4 * (7 * 128 + 1336)
    assert told["model_flops"]["value"] > 1e7 and "counted" in told["model_flops"]["how"]


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "no job of Insitu"), (b"insitu job?", "end too early")]
)
def test_a_file_that_is_no_job_is_said(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    result = run("run", str(tmp_path / "file"), "--model", "insitu/eiffel")
    assert result.exit_code == 2 and said in result.stderr


def test_a_job_for_another_model_says_what_differs(folder: Path) -> None:
    result = run("run", JOB, "--model", str(folder))
    assert result.exit_code == 2
    assert "its class is LlamaForCausalLM, and not GPT2LMHeadModel" in result.stderr


def test_the_tree_as_json_has_the_modules_and_their_weights(tmp_path: Path) -> None:
    module = tiny_llama()
    module.config.save_pretrained(tmp_path)
    found = json.loads(run("tree", str(tmp_path), "--json").stdout)
    modules = dict(module.named_modules())
    assert {type(modules[one["path"]]).__name__ for one in found} == {one["class"] for one in found}
    for one in found:
        own = modules[one["path"]].named_parameters(recurse=False)
        assert one["weights"] == {name: list(weight.shape) for name, weight in own}
    assert found[0]["parameters"] == sum(one.numel() for one in module.parameters())
    assert [one["names"] for one in found if one["path"] == "model.norm"] == [["final_norm"]]


def test_a_differing_check_that_is_written_to_a_page_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report("x", "X", {}, [], [Check("sums", "here", "differs")])
    monkeypatch.setattr("insitu.models.checking.check", lambda *args: report)
    page = tmp_path / "page.html"
    assert run("check", "insitu/eiffel", "--html", str(page)).exit_code == 1
    assert "DIFFERS" in page.read_text()


@pytest.mark.parametrize("name", sampled(["tree", "steer"], ["steer"]))
def test_pngs_without_what_draws_them_are_said_in_a_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> str:
        result = run(*WRITTEN[name][0], "--png", str(tmp_path / "picture.png"))
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.strip().splitlines()[-1:]
        return line

    def none(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("No browser.\nAt all.")

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", none)
    assert said().startswith("No PNG could be drawn: No browser. It takes Chromium")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    assert said() == "Pictures take Kaleido, which is not installed: `pip install 'insitu[plot]'`."
    assert not (tmp_path / "picture.png").exists()


def test_a_file_that_cannot_be_written_is_said_as_such(tmp_path: Path) -> None:
    result = run("tree", "insitu/eiffel", "--html", str(tmp_path / "no" / "page.html"))
    assert result.exit_code == 2
    assert "There is no folder" in result.stderr and "Loading" not in result.stderr


FILES = [(name, option) for name in WRITTEN for option in ("--html", "--picture", "--png")]


@pytest.mark.parametrize(("name", "option"), [*FILES, ("steer", "--vector")])
def test_files_are_checked_before_the_model_is_loaded(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("insitu.LanguageModel", loaded)
    for path in (tmp_path / "none" / "file.png", tmp_path):
        result = run(*WRITTEN[name][0], option, str(path))
        assert result.exit_code == 2 and result.stdout == ""
        assert str(path) in result.stderr.replace("\n", "") and "folder" in result.stderr
    if option in ("--picture", "--png"):
        for ending in (".jpg", ".html", ""):
            result = run(*WRITTEN[name][0], option, str(tmp_path / f"file{ending}"))
            assert result.exit_code == 2 and ".png, .svg or .pdf" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sampled(["tree", "check", "steer"], ["steer"]))
def test_tables_are_written_as_svg_without_a_browser(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    args, words = WRITTEN[name]
    result = run(*args, "--picture", str(tmp_path / "table.svg"))
    assert result.exit_code == 0
    assert f"Wrote {tmp_path / 'table.svg'}." in result.stderr
    text = (tmp_path / "table.svg").read_text()
    assert text.startswith("<svg") and words.split()[0] in text


@pytest.mark.thorough
@needs_chromium
@pytest.mark.parametrize("name", ["lens", "steer"])
def test_pictures_for_papers(name: str, tmp_path: Path) -> None:
    for ending, begins in ((".svg", b"<svg"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")):
        path = tmp_path / f"picture{ending}"
        result = run(*WRITTEN[name][0], "--png", str(path))
        assert result.exit_code == 0 and f"Wrote {path}." in result.stderr
        assert path.read_bytes()[:400].lstrip().startswith(begins)


def test_what_was_written_is_said_beside_json(tmp_path: Path) -> None:
    page, vector = tmp_path / "page.html", tmp_path / "vector"
    result = run(*STEER, "--tokens", "1", "--html", str(page), "--vector", str(vector), "--json")
    assert json.loads(result.stdout)
    assert f"Wrote {page}." in result.stderr and f"Wrote {vector}." in result.stderr
    assert SteeringVector.load(vector).layers == (4,)


@pytest.mark.thorough
def test_positions_of_prompts_of_unlike_lengths() -> None:
    given = [*PATCH, CLEAN, "In Turkey. " + CORRUPTED, "--answer", "Paris", "--instead", "Moscow"]
    refused = run(*given, "--layers", "5")
    assert refused.exit_code == 2 and "such as `--positions -1`" in refused.stderr
    result = run(*given, "--layers", "5", "--positions", "-1", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["values"][0][0] > 0.5


def test_a_patch_gives_the_metric_itself() -> None:
    model = LanguageModel("insitu/eiffel", device_map="cpu")
    right, wrong = model.token_id(" Paris"), model.token_id(" Moscow")
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer.encode(CLEAN)])
        last = model.load()(ids).logits[0, -1]
    given = [*PATCH, CLEAN, CORRUPTED, "--answer", " Paris", "--instead", " Moscow"]
    result = run(*given, "--layers", "5", "--positions", "-1", "--no-normalised", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)["values"]
    assert found == [[pytest.approx(float(last[right] - last[wrong]), rel=1e-4)]]


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        ("-1", ["5"]),
        pytest.param("0,-1", ["0", "5"], marks=pytest.mark.thorough),
        ("-2--1", ["4", "5"]),
        pytest.param("1 - 2", ["1", "2"], marks=pytest.mark.thorough),
    ],
)
def test_layers_from_the_end(written: str, layers: list[str]) -> None:
    result = run("lens", "insitu/eiffel", CLEAN, "--layers", written, "--json")
    assert result.exit_code == 0
    assert dict(json.loads(result.stdout)["axes"])["layer"] == layers


@pytest.mark.parametrize("written", ["", "x", "4-2", "1,,2", "0-999999999", "1.5", "--3"])
def test_what_is_no_list_of_numbers_is_refused(written: str) -> None:
    result = run("lens", "insitu/eiffel", CLEAN, "--layers", written)
    assert result.exit_code == 2 and "Traceback" not in result.stderr


@pytest.mark.thorough
def test_the_first_query_of_attention_is_not_printed_but_written() -> None:
    result = run("attention", "insitu/eiffel", CLEAN, "--layers", "4", "--heads", "0")
    queries = [line.split()[0] for line in result.stdout.splitlines()[3:]]
    assert queries == ["·Louvre", "·is", "·in", "·the", "·city", "·of"]
    written = run("attention", "insitu/eiffel", CLEAN, "--layers", "4", "--heads", "0", "--json")
    assert len(dict(json.loads(written.stdout)["axes"])["query"]) == 7
    assert run("attention", "insitu/eiffel", "The", "--layers", "4").exit_code == 0


def test_the_first_query_is_printed_where_it_looks_at_other_tokens(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        vocab_size=1336, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    module: Any = BertForMaskedLM(config).eval()
    tokenizer = LanguageModel("insitu/eiffel").tokenizer
    for part in (module, tokenizer):
        part.save_pretrained(tmp_path)
    result = run("attention", str(tmp_path), "The Louvre is", "--layers", "0", "--heads", "0")
    module.set_attn_implementation("eager")
    ids = torch.tensor([tokenizer("The Louvre is").input_ids])
    with torch.no_grad():
        first = module(ids, output_attentions=True).attentions[0][0, 0, 0]
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("The "))
    assert row.split()[1:] == [f"{weight:.2f}" for weight in first.tolist()]


def test_axes_may_be_written_with_spaces() -> None:
    given = (*PATCH, CLEAN, CORRUPTED, "--answer", "Paris", "--instead", "Moscow", "--site", "z")
    result = run(*given, "--by", "layer, head", "--json")
    assert [axis[0] for axis in json.loads(result.stdout)["axes"]] == ["layer", "head"]


@pytest.mark.parametrize("name", ["lens", "check", "steer"])
def test_a_dtype_that_is_not_there_is_named(name: str) -> None:
    result = run(*WRITTEN[name][0], "--dtype", "float99")
    assert result.exit_code == 2 and "Loading" not in result.stderr
    assert "'float99'" in result.stderr and "float" in result.stderr.partition("nearest")[2]


def test_the_version_is_that_of_the_package() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"insitu {insitu.__version__}\n"
    assert insitu.__version__ == version("insitu")


def test_steering_writes_its_vector(tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    result = run(*STEER, "--tokens", "1", "--vector", str(path), "--json")
    assert [one["strength"] for one in json.loads(result.stdout)] == [0.0, 1.0]
    assert SteeringVector.load(path).layers == (4,)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["lens", "insitu/eiffel", ""], "The prompt is empty"),
        (["lens", "insitu/eiffel", CLEAN, "--layers", "9"], "There is no layer 9: there are 6."),
        (["lens", "insitu/eiffel", CLEAN, "--layers", "x"], "'x' is no list of numbers"),
        (["attention", "no/such", CLEAN], "no/such"),
        (
            [*PATCH, CLEAN, CORRUPTED, "--answer", "x y", "--instead", "Rome"],
            "' x y' is 3 tokens",
        ),
        (
            [*PATCH, CLEAN, CLEAN, "--answer", " Paris", "--instead", " Moscow"],
            "write `--no-normalised` for the metric itself",
        ),
        ([*PATCH, CLEAN, CORRUPTED, "--answer", "", "--instead", " Moscow"], "'' is 0 tokens"),
        (
            [
                "patch",
                "insitu/eiffel",
                CLEAN,
                "The Kremlin is in",
                "--answer",
                "Paris",
                "--instead",
                "Moscow",
            ],
            "tokens",
        ),
    ],
)
def test_mistakes_are_said_in_a_line(args: list[str], said: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
