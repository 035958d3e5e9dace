"""What works on which architecture, as a table of what tests have shown: docs/architectures.md.

`make architectures` runs the tests of all architectures with each version of Transformers and
gives their results to this, as pytest writes them down: a cell says that something works only
where all tests of it ran and passed. What an architecture does not have is written down in
`zoo/absent.py`: a cell says so only where the test passed that it is said not to be there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from xml.etree import ElementTree

from tests.fidelity.every.page import Row, section, verdicts
from tests.fidelity.zoo import EVERY, Architecture
from tests.fidelity.zoo.absent import ABSENT


@dataclass(frozen=True)
class Capability:
    """Something that one may want to do with a model.

    Attributes:
        title: the head of its column.
        meaning: what works where it does.
        tests: those that show it, all of them.
        absence: that which shows of architectures without it that it is not there.
        otherwise: why there are no tests of it for some architectures.
    """

    title: str
    meaning: str
    tests: tuple[str, ...]
    absence: str = ""
    otherwise: str = ""


TEXT_ONLY = "it takes something else than text, and invocations of it do not share a batch"
NOT_GENERATED = "it continues no text, or it takes more than text, and its generation is not tested"

CAPABILITIES = (
    Capability(
        "read",
        "inputs and outputs of all modules, bit for bit what hooks see; blocks are found",
        (
            "test_inputs_and_outputs_of_all_modules_are_what_hooks_see",
            "test_the_blocks_are_found",
        ),
    ),
    Capability(
        "write",
        "patching hidden states, ablating parts of blocks, steering",
        (
            "test_hidden_states_of_another_input_are_patched_in",
            "test_a_part_of_a_block_is_ablated",
            "test_a_vector_steers",
        ),
    ),
    Capability(
        "noted",
        "the model's own `output_hidden_states` show what was written",
        ("test_what_a_model_notes_of_its_blocks_is_what_was_written",),
        otherwise="it takes something else than text, and this is tested of text",
    ),
    Capability(
        "gradients",
        "gradients of all blocks' hidden states, and of all that has a name",
        (
            "test_gradients_reach_every_block",
            "test_gradients_by_name_are_those_of_autograd",
            "test_gradients_by_name_are_slopes",
        ),
    ),
    Capability(
        "batches",
        "prompts of different length in one batch, each as if it were alone, by name too",
        (
            "test_prompts_of_different_length_do_not_see_each_other",
            "test_a_patch_between_prompts_of_a_batch_reaches_one_of_them",
            "test_gradients_of_several_prompts_are_their_own",
            "test_prompts_of_a_batch_show_by_name_what_they_do_alone",
            "test_what_is_written_by_name_for_a_prompt_of_a_batch_reaches_it_alone",
        ),
        otherwise=TEXT_ONLY,
    ),
    Capability(
        "generation",
        "read and changed step by step, by name too, also of several prompts",
        (
            "test_a_generation_is_changed_in_each_step",
            "test_generations_of_several_prompts_do_not_see_each_other",
            "test_steps_of_several_generations_do_not_see_each_other",
            "test_each_step_of_a_generation_is_read_and_written_by_name",
            "test_what_has_a_name_in_a_step_is_what_it_is_in_one_forward_of_all_steps",
            "test_a_token_that_is_written_into_logits_is_the_next",
        ),
        otherwise=NOT_GENERATED,
    ),
    Capability(
        "cache",
        "a block's keys and values in a generation",
        ("test_with_a_cache_a_block_gives_its_keys_and_values",),
        "test_a_block_with_a_state_gives_no_keys_and_values",
        NOT_GENERATED,
    ),
    Capability(
        "residual",
        "`residual_in`, `residual_mid`, `residual_out` and the additions: read and written",
        (
            "test_what_is_added_to_the_residual_stream_makes_what_leaves_the_block",
            "test_writes_to_what_is_added_reach_what_leaves_the_block",
            "test_writes_to_residual_out_are_what_the_next_block_is_given",
        ),
        "test_where_blocks_normalise_the_sum_there_is_no_residual_stream",
    ),
    Capability(
        "heads",
        "`q`, `k`, `v`, `scores`, `pattern`, `z`, `result`, `W_O`: read and written",
        (
            "test_heads_hang_together_as_attention_does",
            "test_writes_to_heads_do_what_attention_makes_of_them",
            "test_writes_to_what_heads_add_leave_the_bias_alone",
            "test_output_projections_make_with_their_weights_what_they_return",
        ),
        "test_without_attention_nothing_has_a_name_of_its",
    ),
    Capability(
        "W_Q",
        "`W_Q`, `W_K` and `W_V`, with which `q`, `k` and `v` are made",
        ("test_queries_keys_and_values_are_made_with_their_weights",),
        "test_where_no_matrix_makes_queries_keys_and_values_this_is_said",
    ),
    Capability(
        "patterns",
        "`pattern` is what the model itself returns as its attentions",
        ("test_patterns_are_what_hugging_face_returns",),
        "test_without_attention_nothing_has_a_name_of_its",
    ),
    Capability(
        "MLP",
        "`pre` and `post`: read and written; `W_in`, `W_gate` and `W_out`",
        (
            "test_mlps_are_what_stands_around_their_nonlinearity",
            "test_mlps_make_with_their_weights_what_has_a_name_in_them",
        ),
        "test_without_an_mlp_nothing_has_a_name_in_it",
    ),
    Capability(
        "experts",
        "`router` and `weights`: read and written",
        ("test_experts_are_weighted_with_what_is_said_to_weight_them",),
        "test_without_experts_nothing_has_a_name_of_theirs",
    ),
    Capability(
        "logits",
        "`logits`: read and written",
        ("test_logits_are_read_and_written",),
        "test_a_model_that_gives_no_logits_says_so",
    ),
    Capability(
        "W_E",
        "`embedding`, and `W_E` and `W_U`, with which tokens are embedded and unembedded",
        (
            "test_the_embedding_is_what_the_prompt_goes_through",
            "test_tokens_are_embedded_and_unembedded_with_these_weights",
        ),
        "test_without_tokens_there_are_no_weights_of_their_embedding",
    ),
)

KINDS = {
    "decoder": "Decoders",
    "encoder": "Encoders",
    "encoder-decoder": "Encoders and decoders",
    "vision": "Images",
    "contrastive": "Images and text",
    "vision-language": "Images in text",
    "audio": "Sound",
}
NOT_THERE = "this version of Transformers does not have it"


@dataclass(frozen=True)
class Result:
    """What came of a capability of an architecture with one version of Transformers.

    Attributes:
        works: whether all tests of it ran and passed.
        reason: why it does not apply; "" if it works or fails.
    """

    works: bool
    reason: str = ""


def results(*xmls: str) -> dict[tuple[str, str], Result]:
    """Returns what came of each architecture's capabilities, by name and title.

    Args:
        xmls: what pytest wrote with `--junit-xml`, in one or more runs.
    """
    seen: dict[tuple[str, str], list[bool]] = {}
    cases = [case for xml in xmls for case in ElementTree.fromstring(xml).iter("testcase")]
    for case in cases:
        name, _, given = case.attrib["name"].partition("[")
        architecture = _named(given.rstrip("]"))
        if architecture is not None:
            seen.setdefault((architecture, name), []).append(_passed(case))
    ran = {architecture for architecture, _ in seen}
    return {
        (one.name, capability.title): (
            _result(one.name, capability, seen) if one.name in ran else Result(False, NOT_THERE)
        )
        for one in EVERY
        for capability in CAPABILITIES
    }


def _named(given: str) -> str | None:
    """The architecture among a test's parameters, such as "gpt2" or "gpt2-in place"."""
    names = sorted((one.name for one in EVERY), key=len, reverse=True)
    around = "(?:^|-){}(?:$|-)"
    return next((name for name in names if re.search(around.format(name), given)), None)


def _passed(case: ElementTree.Element) -> bool:
    """Whether a test ran to its end and found nothing wrong: not if it skipped either."""
    return all(case.find(kind) is None for kind in ("failure", "error", "skipped"))


def _result(
    architecture: str, capability: Capability, seen: Mapping[tuple[str, str], list[bool]]
) -> Result:
    reason = ABSENT.get(capability.title, {}).get(architecture, "")
    tests = (capability.absence,) if reason else capability.tests
    outcomes = [seen.get((architecture, test), []) for test in tests]
    if not reason and not any(outcomes):
        return Result(False, capability.otherwise)
    passed = all(outcome and all(outcome) for outcome in outcomes)
    return Result(passed and not reason, reason if passed else "")


def page(
    runs: Mapping[str, Mapping[tuple[str, str], Result]],
    types: Mapping[str, Mapping[tuple[str, str], Row]],
) -> str:
    """Returns the page: every type of model first, then those that are tested in depth.

    Args:
        runs: results by the version of Transformers, the newest first.
        types: what came of the standard names of every type, likewise.
    """
    totals, lines = section(types)
    said = (
        "`make architectures` made this page, on small models with random weights. Each was "
        "compared with plain PyTorch hooks. A cell says *yes* if the names are right on all layers "
        "that have them. A number in parentheses means: refused before the run, for the reason "
        "below. [5] and [4] mean: with that generation of Transformers. Where a group has several "
        "names, some may be refused and the rest right. `insitu check` tells about any other model "
        "(see [names](names.md))."
    )
    return "\n".join(
        [
            "# Architectures: what works on which",
            "",
            *wrap(totals, 120, break_on_hyphens=False),
            "",
            *wrap(said, 120, break_on_hyphens=False),
            "",
            *lines,
            "",
            table(runs),
        ]
    )


def table(runs: Mapping[str, Mapping[tuple[str, str], Result]]) -> str:
    """Returns the part of the page on what is tested in depth.

    Args:
        runs: results by the version of Transformers, the newest first.
    """
    reasons: list[str] = []
    lines = [*_head(list(runs)), *_rows(runs, reasons)]
    lines += ["", "—: not of this architecture, because", ""]
    lines += [
        f"- ({letter}) {reason}." for letter, reason in zip(_letters(), reasons, strict=False)
    ]
    lines += ["", "What the columns mean:", ""]
    lines += [f"- **{one.title}**: {one.meaning}." for one in CAPABILITIES]
    return "\n".join([*lines, ""])


def _head(versions: Sequence[str]) -> list[str]:
    said = (
        "These tests go beyond names: reading, writing, gradients, batches and generation, on "
        f"small models of these architectures, with Transformers {' and '.join(versions)}. A cell "
        "says *both* if all tests passed with both. A number means: only with that generation, "
        "because the other fails a test or does not have the architecture. **no** means: a test "
        "fails with both."
    )
    return [
        "## Tested in depth",
        "",
        *wrap(said, 120, break_on_hyphens=False),
        "",
        f"| architecture | {' | '.join(one.title for one in CAPABILITIES)} |",
        f"|{' --- |' * (len(CAPABILITIES) + 1)}",
    ]


def _rows(
    runs: Mapping[str, Mapping[tuple[str, str], Result]], reasons: list[str]
) -> Iterator[str]:
    for kind, heading in KINDS.items():
        rows = [one for one in EVERY if one.kind == kind]
        if rows:
            yield f"| *{heading}* |{' |' * len(CAPABILITIES)}"
        for one in rows:
            cells = [_cell(one, capability, runs, reasons) for capability in CAPABILITIES]
            yield f"| {one.name} | {' | '.join(cells)} |"


def _cell(
    one: Architecture,
    capability: Capability,
    runs: Mapping[str, Mapping[tuple[str, str], Result]],
    reasons: list[str],
) -> str:
    found = {version: run[one.name, capability.title] for version, run in runs.items()}
    works = [version.partition(".")[0] for version, result in found.items() if result.works]
    if len(works) == len(found):
        return "both"
    if works:
        return works[0]
    said = {result.reason for result in found.values() if result.reason != NOT_THERE}
    reason = next(iter(said), NOT_THERE)
    if "" in said:
        return "**no**"
    if reason not in reasons:
        reasons.append(reason)
    return f"— ({_letters()[reasons.index(reason)]})"


def _letters() -> str:
    return "abcdefghijklmnopqrstuvwxyz"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="where to write it")
    parser.add_argument("runs", nargs="+", help="version=file, the newest first")
    given = parser.parse_args()
    written: dict[str, list[str]] = {}
    for run in given.runs:
        version, _, path = run.partition("=")
        written.setdefault(version, []).append(Path(path).read_text())
    found = {version: results(*xmls) for version, xmls in written.items()}
    types = {version: verdicts(*xmls) for version, xmls in written.items()}
    given.page.write_text(page(found, types))


if __name__ == "__main__":
    main()
