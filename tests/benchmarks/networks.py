"""Make decoders and encoders of any size with random weights that look trained, and token sequences for them.

    python tests/benchmarks/networks.py SHAPE PATH [--samples N] [--tokens N] [--inline] [--cache] [--tied] [--seed N]

SHAPE is smollm2 (163 million weights), tinyllama (1.1 billion), minilm, small, or decoder:N or encoder:N for about N
weights. Any size takes about 100 MB of memory. Samples go to calib.npz next to the model.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from decoder_graph import draft_decoder
from encoder_graph import draft_encoder
from shapes import MINILM, READY, SMALL, SMOLLM2, TINYLLAMA, Decoder, Encoder, decoder_of, encoder_of

__all__ = ["MINILM", "SMALL", "SMOLLM2", "TINYLLAMA", "Decoder", "Encoder", "decoder_of", "encoder_of"]
__all__ += ["named", "samples", "write"]

FAMILIES: dict[str, Callable[[int], Decoder | Encoder]] = {"decoder": decoder_of, "encoder": encoder_of}
REPEATED = 0.3  # share of tokens that continue a fixed bigram


def write(shape: Decoder | Encoder, path: Path | str, seed: int = 0, inline: bool = False) -> None:
    """Write the network to `path`; its tensors go to `<name>_data` next to it unless `inline`."""
    draft = draft_decoder(shape, seed) if isinstance(shape, Decoder) else draft_encoder(shape, seed)
    draft.write(Path(path), inline)


def samples(
    path: Path | str, count: int, tokens: int, vocabulary: int, seed: int = 0, extra: str = "position_ids"
) -> None:
    """Write an .npz of `count` sequences for a network without caches: input_ids, attention_mask and `extra`.

    All are int64 [count, tokens]. The ids follow Zipf's law, a low id being frequent, with repeated bigrams.
    """
    rng = np.random.default_rng(seed)
    chances = 1 / (np.arange(vocabulary) + 2.7)
    chances /= chances.sum()
    ids = rng.choice(vocabulary, (count, tokens), p=chances)
    successors, repeats = rng.choice(vocabulary, vocabulary, p=chances), rng.random((count, tokens)) < REPEATED
    for k in range(1, tokens):
        ids[:, k] = np.where(repeats[:, k], successors[ids[:, k - 1]], ids[:, k])
    others = {"position_ids": np.tile(np.arange(tokens), (count, 1)), "token_type_ids": np.zeros_like(ids)}
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), extra: others[extra]}
    np.savez(path, allow_pickle=False, **arrays)


def samples_of(shape: Decoder | Encoder, path: Path | str, count: int, tokens: int, seed: int = 0) -> None:
    """Write samples with the inputs of `shape`."""
    extra = "position_ids" if isinstance(shape, Decoder) else "token_type_ids"
    samples(path, count, tokens, shape.vocabulary, seed, extra)


def named(name: str) -> Decoder | Encoder:
    """Return the shape that the command line calls `name`. Raises argparse.ArgumentTypeError."""
    family, _, weights = name.partition(":")
    if name in READY:
        return READY[name]
    if family in FAMILIES and weights.isdecimal():
        return FAMILIES[family](int(weights))
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(READY)}, decoder:N, encoder:N")


def main() -> None:
    """Write a model and its samples."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", type=named)
    arguments.add_argument("path", type=Path)
    arguments.add_argument("--samples", type=int, default=32, metavar="N", help="0 for none")
    arguments.add_argument("--tokens", type=int, default=256, metavar="N", help="length of a sample")
    arguments.add_argument("--inline", action="store_true", help="keep the tensors in the model's own file")
    arguments.add_argument("--cache", action="store_true", help="give a decoder past keys and values")
    arguments.add_argument("--tied", action="store_true", help="make a decoder's table its head")
    arguments.add_argument("--seed", type=int, default=0, metavar="N")
    args = arguments.parse_args()
    shape = args.shape
    if isinstance(shape, Decoder):
        shape = replace(shape, cache=args.cache, tied=args.tied)
    args.path.parent.mkdir(parents=True, exist_ok=True)
    write(shape, args.path, args.seed, args.inline)
    if args.samples:
        samples_of(shape, args.path.with_name("calib.npz"), args.samples, args.tokens, args.seed)


if __name__ == "__main__":
    main()
