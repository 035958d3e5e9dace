import contextlib
import inspect

import torch

from insitu.graph.location import here


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
