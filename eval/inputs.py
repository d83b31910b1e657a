"""What reaches a decoder: said with every figure of what it draws."""

from dataclasses import dataclass

from unclip_pl.networks.text import StatesText
from unclip_pl.stages.decoder import Decoder


@dataclass(frozen=True)
class DecoderInputs:
    """What reaches the decoder under a condition.

    Args:
        embedding: what stands for the image embedding, in words; None for its null embedding.
        tokens: whether attention sees the caption's token states.
        text_embed: whether CLIP's text embedding z_t is added to the timestep embedding: "no" where
            the decoder has no such input, "yes", or "null" where it has one that is kept empty.
    """

    embedding: str | None
    tokens: bool
    text_embed: str

    def __str__(self) -> str:
        parts = [self.embedding] if self.embedding else []
        if self.tokens:
            parts.append("the caption's tokens")
        if self.text_embed == "yes":
            parts.append("z_t with the timestep")
        if self.text_embed == "null":
            parts.append("z_t's null")
        return " + ".join(parts) or "nothing"


def decoder_inputs(
    decoder: Decoder, embedding: str | None, text_embed: bool = True
) -> DecoderInputs:
    """What reaches this decoder; with `text_embed` False, z_t is kept out."""
    encoder = decoder.text.encoder
    has_text_embed = isinstance(encoder, StatesText) and encoder.pooled_proj is not None
    if not has_text_embed:
        return DecoderInputs(embedding, encoder is not None, "no")
    return DecoderInputs(embedding, encoder is not None, "yes" if text_embed else "null")
