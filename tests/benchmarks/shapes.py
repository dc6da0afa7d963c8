"""Sizes of decoders and encoders: known ones by name, and families in which the weights, layers or width grow."""

from dataclasses import dataclass, replace
from typing import TypeVar

HEAD = 64  # width of a head in the families


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama-shaped decoder; `cache` adds past keys and values, `tied` makes the table its head."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    cache: bool = False
    tied: bool = False

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def weights(self) -> int:
        """Number of elements of all matrices and tables."""
        attention = 2 * self.width * (self.width + self.kv_heads * self.head_width)
        tables = (1 if self.tied else 2) * self.vocabulary * self.width
        return self.layers * (attention + 3 * self.width * self.hidden) + tables


@dataclass(frozen=True)
class Encoder:
    """Sizes of a BERT-shaped encoder; `decomposed` writes each LayerNormalization as its nine operators."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int
    positions: int = 512
    decomposed: bool = False

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def weights(self) -> int:
        """Number of elements of all matrices and tables."""
        tables = (self.vocabulary + self.positions + 2) * self.width
        return self.layers * (4 * self.width**2 + 2 * self.width * self.hidden) + tables


Shape = TypeVar("Shape", Decoder, Encoder)

SMALL = Decoder(layers=4, width=256, hidden=768, heads=8, kv_heads=4, vocabulary=4096)
SMOLLM2 = Decoder(layers=30, width=576, hidden=1536, heads=9, kv_heads=3, vocabulary=49152)
TINYLLAMA = Decoder(layers=22, width=2048, hidden=5632, heads=32, kv_heads=4, vocabulary=32000)
MINILM = Encoder(layers=6, width=384, hidden=1536, heads=12, vocabulary=30522)
READY: dict[str, Decoder | Encoder] = {"small": SMALL, "smollm2": SMOLLM2, "tinyllama": TINYLLAMA, "minilm": MINILM}


def decoder(layers: int, width: int, vocabulary: int = 4096) -> Decoder:
    """Make a decoder with heads of 64 channels, a quarter of them for keys and values; width is a multiple of 64."""
    heads = width // HEAD
    kv_heads = max(k for k in range(1, max(1, heads // 4) + 1) if heads % k == 0)
    return Decoder(layers, width, width * 11 // 4, heads, kv_heads, vocabulary)


def encoder(layers: int, width: int, vocabulary: int = 4096) -> Encoder:
    """Make an encoder with heads of 64 channels; width is a multiple of 64."""
    return Encoder(layers, width, 4 * width, width // HEAD, vocabulary)


def decoder_of(weights: int) -> Decoder:
    """Make a decoder of about `weights` weights: layers in proportion to the width, tables with a constant share."""
    return _nearest([decoder(k, w, w * w // 64) for k, w in _grown()], weights)


def encoder_of(weights: int) -> Encoder:
    """Make an encoder of about `weights` weights: layers in proportion to the width, tables with a constant share."""
    return _nearest([encoder(k, w, w * w // 32) for k, w in _grown()], weights)


def with_layers(shape: Shape, layers: int) -> Shape:
    return replace(shape, layers=layers)


def with_width(shape: Decoder | Encoder, width: int) -> Decoder | Encoder:
    """Change the width and what follows from it; the layers and the vocabulary stay."""
    if isinstance(shape, Decoder):
        wide = decoder(shape.layers, width)
        return replace(shape, width=width, hidden=wide.hidden, heads=wide.heads, kv_heads=wide.kv_heads)
    return replace(shape, width=width, hidden=4 * width, heads=width // HEAD)


def _grown() -> list[tuple[int, int]]:
    """Layers and widths of networks about as deep as BERT for their width."""
    widths = range(HEAD, 8192, HEAD)
    return [(k, w) for w in widths for k in range(max(1, w // HEAD - 1), w // HEAD + 2)]


def _nearest(shapes: list[Shape], weights: int) -> Shape:
    return min(shapes, key=lambda s: abs(s.weights - weights))
