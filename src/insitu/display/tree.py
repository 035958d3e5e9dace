"""Module trees as text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True, slots=True)
class Branch:
    """One module, or a run of like modules, of a tree.

    Attributes:
        name: the attribute or index that leads to it; "0-11" for a run.
        kind: its class, with the sizes that its class shows.
        children: the nodes in it.
    """

    name: str
    kind: str
    children: tuple[Branch, ...]


def summarise(name: str, module: nn.Module) -> Branch:
    """Returns a module's tree, in which neighbours that differ only in their index are one.

    Args:
        name: what to call the module.
        module: any module; its weights are not looked at.
    """
    parts = [summarise(key, part) for key, part in module._modules.items() if part is not None]
    children: list[Branch] = []
    for part in parts:
        last = children[-1] if children else None
        if last and part.name.isdigit() and replace(part, name=last.name) == last:
            first = last.name.partition("-")[0]
            children[-1] = replace(last, name=f"{first}-{part.name}")
        else:
            children.append(part)
    detail = module.extra_repr() if not parts else ""
    kind = type(module).__name__
    return Branch(name, f"{kind}({detail})" if detail else kind, tuple(children))


def render(branch: Branch) -> str:
    """Returns a tree as lines of text, one a module."""
    return "\n".join([f"{branch.name}: {branch.kind}", *_lines(branch.children, "")])


def _lines(branches: tuple[Branch, ...], indent: str) -> list[str]:
    lines: list[str] = []
    for place, branch in enumerate(branches):
        last = place == len(branches) - 1
        name = f"[{branch.name}]" if branch.name.replace("-", "").isdigit() else branch.name
        lines.append(f"{indent}{'└── ' if last else '├── '}{name}: {branch.kind}")
        lines += _lines(branch.children, indent + ("    " if last else "│   "))
    return lines
