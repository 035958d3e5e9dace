"""Writes down sparse autoencoders with SAELens, and what it makes of activations with them.

Run by `agreement_on_saes.py` in an environment with SAELens, where nothing of these tests is
installed and Insitu is not used: `python saes_of_sae_lens.py FOLDER`. Each gets a folder of its
own, as SAELens saves it, with `told.safetensors` beside its files: `x`, its `features` and what
they are `decoded` to.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from sae_lens import SAE
from safetensors.torch import save_file

warnings.simplefilter("ignore")
torch.set_grad_enabled(False)

KINDS = {"standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": 6}}
OPTIONS = {
    "plain": {},
    "uncentred": {"apply_b_dec_to_input": False},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "by_norm": {"rescale_acts_by_decoder_norm": True},
}


def tell(folder: Path, kind: str, options: dict[str, object]) -> None:
    config = {
        "architecture": kind,
        "d_in": 16,
        "d_sae": 50,
        "dtype": "float32",
        "device": "cpu",
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
        **KINDS[kind],
        **options,
    }
    torch.manual_seed(0)
    sae = SAE.from_dict(config)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    if kind == "jumprelu":
        sae.threshold.abs_()
    sae.save_model(folder)
    x = torch.randn(3, 4, 16) * 2 + 0.5
    features = sae.encode(x)
    told = {"x": x, "features": features, "decoded": sae.decode(features)}
    save_file({k: v.contiguous() for k, v in told.items()}, folder / "told.safetensors")


if __name__ == "__main__":
    for kind in KINDS:
        for name, options in OPTIONS.items():
            if name != "by_norm" or kind == "topk":
                tell(Path(sys.argv[1]) / f"{kind}-{name}", kind, options)
