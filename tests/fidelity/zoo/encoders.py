"""Models of text that look both ways, and those of an encoder and a decoder."""

from typing import Any

from tests.fidelity.zoo.architecture import (
    VOCABULARY,
    Architecture,
    drawing,
    encoder,
    ids,
)


def encoder_decoder(name: str, model: str, stacks: tuple[str, str], **config: Any) -> Architecture:
    tokens = {
        "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
        "decoder_start_token_id": 3,
    }  # fmt: skip
    draw = drawing(
        input_ids=ids, decoder_input_ids=lambda rows, length, seed: ids(rows, 3, seed + 1)
    )
    return Architecture(name, "encoder-decoder", model, {**tokens, **config}, stacks, draw=draw)


ENCODERS = [
    encoder(
        "bert", "BertForMaskedLM", "bert.encoder.layer",
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=64,
    ),
    encoder(
        "roberta", "RobertaForMaskedLM", "roberta.encoder.layer",
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=64,
    ),
    encoder(
        "distilbert", "DistilBertForMaskedLM", "distilbert.transformer.layer",
        dim=16, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=64,
    ),
    encoder(
        "modernbert", "ModernBertForMaskedLM", "model.layers",
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=64, global_attn_every_n_layers=2, local_attention=4,
        bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2,
    ),
    # As deep on both sides: with some versions it generates only then.
    encoder_decoder(
        "t5", "T5ForConditionalGeneration", ("encoder.block", "decoder.block"),
        d_model=16, d_kv=6, d_ff=40, num_layers=2, num_heads=4,
    ),
    encoder_decoder(
        "bart", "BartForConditionalGeneration", ("model.encoder.layers", "model.decoder.layers"),
        d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=24,
        max_position_embeddings=64, forced_eos_token_id=None,
    ),
]  # fmt: skip
