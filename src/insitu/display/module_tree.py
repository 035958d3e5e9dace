"""Module trees with their contents: shapes, numbers of parameters, and standard names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from torch import nn

from insitu.display.tree import Branch, summarise

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


_WIDE = 100
_MIDDLE = 70


@dataclass(frozen=True, slots=True)
class Line:
    """A module of the tree, or a run of like ones.

    Attributes:
        path: its path; of a run, that of the first.
        drawn: the lines that lead to it, and its name.
        kind: its class.
        shapes: the shapes of its own weights, by name.
        count: how many numbers its weights are, with those of all modules in it.
        hidden: how many modules in it are not shown.
    """

    path: str
    drawn: str
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    count: int
    hidden: int


@dataclass(frozen=True, slots=True)
class ModuleTree:
    """A tree of modules, to be printed.

    Attributes:
        lines: its modules.
        names: the standard names that stand for each, by path.
    """

    lines: Sequence[Line]
    names: Mapping[str, Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        room = options.max_width
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("module", no_wrap=True)
        if room >= _WIDE:
            table.add_column("weights", style="dim", overflow="fold")
        table.add_column("parameters", justify="right", no_wrap=True)
        if room >= _MIDDLE:
            table.add_column("names", style="cyan", overflow="fold")
        for line in self.lines:
            hidden = f" … {line.hidden} modules" if line.hidden else ""
            drawn = Text.assemble(line.drawn, (f": {line.kind}", "dim"), (hidden, "dim italic"))
            shapes = ", ".join(f"{name} {_shape(shape)}" for name, shape in line.shapes.items())
            names = ", ".join(self.names.get(line.path, ()))
            count = f"{line.count:,}" if line.count else ""
            before = [Text(shapes)] if room >= _WIDE else []
            after = [Text(names)] if room >= _MIDDLE else []
            table.add_row(drawn, *before, Text(count), *after)
        yield table
        if room < _WIDE:
            left = "weights" if room >= _MIDDLE else "weights and names"
            yield Text(f"A wider terminal shows {left} too.", style="dim")

    def to_list(self) -> list[dict[str, Any]]:
        """Returns its modules in JSON's own types, one after the other."""
        return [
            {
                "path": line.path,
                "class": line.kind,
                "weights": {name: list(shape) for name, shape in line.shapes.items()},
                "parameters": line.count,
                "names": list(self.names.get(line.path, ())),
            }
            for line in self.lines
        ]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=140, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    __repr__ = __str__


def branches(module: nn.Module, depth: int | None = None, name: str = "model") -> list[Line]:
    """Returns the modules of a tree, in which neighbours that differ only in their index are one.

    Args:
        module: the module; its weights are not looked at.
        depth: how deep to go; None for all.
        name: what to call it.
    """
    return [*_lines(summarise(name, module), module, 1, "", "", "", depth)]


def _lines(
    branch: Branch,
    module: nn.Module,
    times: int,
    path: str,
    lead: str,
    indent: str,
    depth: int | None,
) -> Iterator[Line]:
    children = branch.children if depth != 0 else ()
    shapes = {key: tuple(one.shape) for key, one in module.named_parameters(recurse=False)}
    count = times * sum(one.numel() for one in module.parameters())
    hidden = 0 if children else sum(1 for _ in module.modules()) - 1
    name = f"[{branch.name}]" if branch.name.replace("-", "").isdigit() else branch.name
    kind = branch.kind.partition("(")[0]
    yield Line(path, lead + name, kind, shapes, count, hidden)
    for at, child in enumerate(children):
        last = at == len(children) - 1
        first, _, end = child.name.partition("-") if _is_run(child.name) else (child.name, "", "")
        many = int(end) - int(first) + 1 if end else 1
        inside = f"{path}.{first}" if path else first
        deeper = None if depth is None else depth - 1
        draw = indent + ("└── " if last else "├── ")
        next_ = indent + ("    " if last else "│   ")
        part = module._modules[first]
        assert part is not None
        yield from _lines(child, part, times * many, inside, draw, next_, deeper)


def _is_run(name: str) -> bool:
    return name.replace("-", "").isdigit()


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
