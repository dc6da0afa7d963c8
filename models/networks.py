"""The two classifiers of 28x28 grey images: a residual CNN and a transformer on patches.

Both map float images [N, 1, 28, 28] to logits [N, 10]. Between them they hold the structures that decide the
quality of a quantized network: BatchNorm after every convolution, residual Adds, depthwise and strided
convolutions in the CNN; LayerNorm, attention and Gelu in the transformer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the image size (over its stride), and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def basic_block(width: int) -> list[nn.Module]:
    """Two 3x3 convolutions around a shortcut, Relu after the Add (He et al., 2016)."""
    body = [*conv_bn(width, width, 3), nn.ReLU(), *conv_bn(width, width, 3)]
    return [Residual(*body), nn.ReLU()]


def inverted_block(width: int, expansion: int) -> Residual:
    """Expansion, depthwise 3x3, linear projection around a shortcut (Sandler et al., 2018)."""
    hidden = width * expansion
    return Residual(
        *conv_bn(width, hidden, 1),
        nn.ReLU(),
        *conv_bn(hidden, hidden, 3, groups=hidden),
        nn.ReLU(),
        *conv_bn(hidden, width, 1),
    )


def digits_cnn() -> nn.Sequential:
    """A residual CNN at 28x28, 14x14 and 7x7, with global average pooling."""
    return nn.Sequential(
        *conv_bn(1, 16, 3),
        nn.ReLU(),
        *conv_bn(16, 32, 3, stride=2),
        nn.ReLU(),
        *basic_block(32),
        inverted_block(32, expansion=2),
        *conv_bn(32, 40, 3, stride=2),
        nn.ReLU(),
        *basic_block(40),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, CLASSES),
    )


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


def transformer_block(width: int, heads: int, expansion: int) -> nn.Sequential:
    """Attention, then a two-layer perceptron, each behind a LayerNorm and around a shortcut."""
    hidden = width * expansion
    perceptron = (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    return nn.Sequential(
        Residual(nn.LayerNorm(width), Attention(width, heads)),
        Residual(nn.LayerNorm(width), *perceptron),
    )


class DigitsViT(nn.Module):
    """A vision transformer on 4x4 patches with a class token (Dosovitskiy et al., 2021)."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        tokens = (28 // patch) ** 2 + 1
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(transformer_block(width, heads, expansion=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(tokens + self.position))[:, 0])
