"""Results of every kind that can be drawn, with labels of every kind."""

import torch

from insitu.display import Axis
from insitu.methods import Result

TOWER = ("The", " E", "iff", "el", " Tower", " is", " in", " the", " city", " of")
LOUVRE = ("The", " Lou", "vre", " is", " in", " the", " city", " of")
WORDS = (" the", " city", " Paris", "<|endoftext|>", " a", "\n", " of", " France")
ODD = (
    *("<|begin_of_text|>", " antidisestablishmentarianism", " <b>bold</b>", " $x$ $y$"),
    *("\x1b[31m", "Ж", "&amp;", " ", "\t", "  "),
)
LONG = tuple("\n" if at % 3 == 0 else f" word{at}" for at in range(150))
STRENGTHS = Axis.of("strength", (-8, -4, -2, -1, 0, 1, 2, 4, 8))


def counted(name: str, count: int) -> Axis:
    return Axis.of(name, range(count))


def patterns(*heads: int, length: int = 10) -> torch.Tensor:
    future = torch.ones(length, length).triu(1).bool()
    return torch.randn(*heads, length, length).masked_fill(future, -torch.inf).softmax(-1)


def results() -> dict[str, Result]:
    """What is drawn, by name."""
    torch.manual_seed(0)
    position, louvre = Axis("position", TOWER), (TOWER, LOUVRE, TOWER)
    query, key = Axis("query", TOWER), Axis("key", TOWER)
    ragged = torch.rand(3, 6, 10)
    ragged[1, :, 8:] = float("nan")
    texts = tuple(WORDS[at % len(WORDS)] for at in range(60))
    sites = Axis("site", ("residual_in", "attention_out", "mlp_out"))
    parts = ("embedding", *(f"layer {n} {part}" for n in range(6) for part in ("attention", "mlp")))

    def made(title: str, quantity: str, values: torch.Tensor, *axes: Axis, **more) -> Result:
        return Result(title, quantity, values, axes, **more)

    layers = counted("layer", 6)
    return {
        "lens": made(
            "Logit lens",
            "probability of the most likely token",
            torch.rand(6, 10),
            *(layers, position),
            tokens=(TOWER,),
            texts=texts,
        ),
        "patching": made(
            "Activation patching of residual_in: The Louvre is in the city of, with states of "
            "The Kremlin is in the city of",
            "logit difference, 0 as in the corrupt run, 1 as in the clean one",
            torch.randn(12, 10),
            *(counted("layer", 12), position),
            tokens=(TOWER,),
            centre=0.0,
        ),
        "heads": made(
            "Attribution of heads",
            "logit difference",
            torch.randn(32, 40),
            *(counted("layer", 32), counted("head", 40)),
            centre=0.0,
        ),
        "attention": made("Head 2.3", "attention", patterns(), query, key, tokens=(TOWER,)),
        "head_grid": made(
            "Layer 2", "attention", patterns(7), counted("head", 7), query, key, tokens=(TOWER,)
        ),
        "layer_slider": made(
            "Attention",
            "attention",
            patterns(14, 4),
            *(counted("layer", 14), counted("head", 4), query, key),
            tokens=(TOWER,),
        ),
        "prompt_menu": made(
            "Lens of prompts",
            "probability",
            ragged,
            *(counted("prompt", 3), layers, counted("position", 10)),
            tokens=louvre,
        ),
        "prompts": made(
            "Surprise",
            "nats",
            ragged[:, 0],
            *(counted("prompt", 3), counted("position", 10)),
            tokens=louvre,
        ),
        "sites": made(
            "Causal tracing", "effect", torch.randn(3, 6, 10), sites, layers, position, centre=0.0
        ),
        "long_prompt": made(
            "A long prompt",
            "probability",
            torch.rand(24, 150),
            *(counted("layer", 24), Axis("position", LONG)),
        ),
        "one_row": made("One row", "nats", torch.randn(1, 5), counted("layer", 1), position[:5]),
        "odd": made(
            "Odd <i>tokens</i> &amp; $x$ $y$",
            "a < b & c",
            torch.rand(4, 10),
            *(counted("layer", 4), Axis("position", ODD)),
            tokens=(ODD,),
        ),
        "tokens": made("Saliency", "norm of the gradient", torch.rand(10), position),
        "signed": made("Attribution", "logits", torch.randn(10), position, centre=0.0),
        "parts": made(
            "Direct logit attribution", "logits", torch.randn(13), Axis("site", parts), centre=0.0
        ),
        "layers": made("Probe", "accuracy", torch.rand(24), counted("layer", 24)),
        "neurons": made("Neurons", "activation", torch.rand(512), counted("neuron", 512)),
        "curve": made("Steering", "probability of the answer", torch.rand(9), STRENGTHS),
        "curves": made("Steering", "probability", torch.rand(6, 9), layers, STRENGTHS),
        "number": made("Loss", "nats", torch.tensor(2.3)),
    }


def pictures() -> dict[str, object]:
    """A figure of each kind, by name."""
    found = results()
    options: dict[str, tuple[Result, dict]] = {name: (one, {}) for name, one in found.items()}
    options |= {
        "attention_text": (found["attention"], {"kind": "text"}),
        "head_text": (found["head_grid"], {"kind": "text"}),
        "signed_text": (found["signed"], {"kind": "text"}),
        "long_text": (found["long_prompt"].select(layer=3), {"kind": "text"}),
        "lines": (found["curves"], {"kind": "line"}),
        "grouped": (found["curves"], {"kind": "bars"}),
        "sized": (found["patching"], {"width": 900, "height": 500}),
        "narrow": (found["head_grid"], {"width": 640}),
    }
    return {name: one.plot(**given) for name, (one, given) in options.items()}
