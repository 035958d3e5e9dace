import contextlib
import inspect
from pathlib import Path
from types import CodeType

import torch

import insitu
from insitu.graph.location import Location, here


def test_a_location_knows_file_line_and_text() -> None:
    line = inspect.currentframe().f_lineno + 1
    location = here(1)  # this very line
    assert (location.file, location.line) == (__file__, line)
    assert location.text == "location = here(1)  # this very line"
    assert str(location).splitlines()[0] == f'  File "{__file__}", line {line}'


def test_frames_of_libraries_are_passed_over() -> None:
    class Tensorlike:
        @classmethod
        def __torch_function__(cls, *args, **kwargs):
            return located()

    def located():
        return here(1)

    inner = torch.nn.functional.softmax(Tensorlike(), -1)
    assert inner.code.co_name == "located"

    @contextlib.contextmanager
    def manager():
        yield here(1)

    with manager() as location:
        assert location.code.co_name == "manager"


def test_a_location_in_code_without_a_file_still_has_a_line() -> None:
    namespace: dict = {"here": here}
    exec("\n\nfound = here(1)", namespace)
    assert namespace["found"].line == 3
    assert namespace["found"].text == ""


def _all_in(code: CodeType) -> list[CodeType]:
    nested = [
        one for const in code.co_consts if isinstance(const, CodeType) for one in _all_in(const)
    ]
    return [code, *nested]


def test_the_line_of_every_instruction_is_the_one_that_python_gives_it() -> None:
    files = sorted((Path(insitu.__file__).parent / "graph").glob("*.py"))
    found = [one for file in files for one in _all_in(compile(file.read_text(), file, "exec"))]
    assert len(found) > 1_000  # more than are kept
    for code in found:
        for at, (line, *_) in enumerate(code.co_positions()):
            assert Location(code, 2 * at).line == (line or code.co_firstlineno)


def test_the_same_code_at_another_line_is_told_apart() -> None:
    first, second = (
        compile(f"x = 1\n{lines}y = here(1)", "cell", "exec") for lines in ("", "\n\n")
    )
    for code, line in ((first, 2), (second, 4), (first, 2)):
        names = {"here": here}
        exec(code, names)
        assert names["y"].line == line
