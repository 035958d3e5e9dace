from rich.console import Console

from insitu.display.report import Check, Found, Part, Report, render

NAMES = (
    Found("residual_in", "h[0].input", (2, 7, 16)),
    Found("mlp", "h[0].mlp: MLP"),
    Found("experts", missing="there are no experts in this block."),
)


def text(report: Report) -> list[str]:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render(report))
    return [line.rstrip() for line in captured.get().splitlines()]


def report(*checks: Check) -> Report:
    parts = (Part("h[0-1]", "h[0]", NAMES),)
    return Report("tiny", "TinyLM", {"n_layers": 2, "d_model": 16}, parts, checks)


def test_names_are_shown_with_shapes_and_where_they_are_in_the_block() -> None:
    lines = text(report())
    assert lines[:2] == ["tiny: TinyLM", "n_layers 2, d_model 16"]
    assert [" ".join(line.split()) for line in lines[3:7]] == [
        "h[0-1]",
        "residual_in (2, 7, 16) input",
        "mlp mlp: MLP",
        "experts — there are no experts in this block.",
    ]


def test_checks_that_went_alike_are_one_line_and_what_differs_is_shown_by_itself() -> None:
    checks = (
        Check("sums", "h[0]", "ok", 1e-7, 8e-6),
        Check("sums", "h[1]", "ok", 2e-7, 8e-6),
        Check("sums", "h[2]", "differs", 0.25, 8e-6, "a + b is not c"),
        Check("sums", "h[3]", "differs", 0.5, 8e-6, "a + b is not c"),
        Check("sums", "h[4]", "not checked", note="there is no c."),
        Check("logits", "head", "ok", 0.0, 8e-6, "scaled by 2"),
        Check("logits", "head", "differs", None, 8e-6, "there are numbers that are none"),
    )
    found = report(*checks)
    assert not found.ok
    shown = [" ".join(line.split()) for line in text(found)[8:]]
    assert shown == [
        "In a run of the model",
        "sums DIFFERS h[2]: largest difference 2.5e-01 (rounding makes 8.0e-06), a + b is not c",
        "sums DIFFERS h[3]: largest difference 5.0e-01 (rounding makes 8.0e-06), a + b is not c",
        "sums OK 2 times: largest difference 2.0e-07 in h[1]",
        "sums — h[4]: there is no c.",
        "logits DIFFERS head: there are numbers that are none",
        "logits OK head: largest difference 0.0e+00, scaled by 2",
    ]


def test_what_was_not_checked_does_not_differ() -> None:
    assert report(Check("sums", "h[0]", "not checked", note="why")).ok
