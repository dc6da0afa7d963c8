"""A character-level decoder of the Llama kind: RMSNorm, rotary positions, grouped-query attention and SwiGLU.

    h = x + o(attention(norm(x)))        y = h + down(silu(gate(norm(h))) * up(norm(h)))

The embedding table is also the head. `Decoder` maps tokens [N, T] to logits [N, T, V]; `CachedDecoder`, with the same
weights, also reads and returns the keys and values of earlier tokens, as Hugging Face Optimum exports decoders.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, DEPTH, HIDDEN = 64, 3, 128
HEADS, SHARED_HEADS, HEAD_WIDTH = 4, 2, 16  # two heads of queries read one of keys and values
CONTEXT = 256  # positions
BASE = 10_000.0

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each block, [N, SHARED_HEADS, T, HEAD_WIDTH]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang, Sennrich, 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def rotary_tables() -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles, [CONTEXT, HEAD_WIDTH] (Su et al., 2021)."""
    angles = torch.outer(torch.arange(CONTEXT), BASE ** (-torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH))
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (k, k + HEAD_WIDTH/2) of x [N, heads, T, HEAD_WIDTH] by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


class Block(nn.Module):
    """One layer; `past` is None without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = RMSNorm(), RMSNorm()
        self.q = nn.Linear(WIDTH, HEADS * HEAD_WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, SHARED_HEADS * HEAD_WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, SHARED_HEADS * HEAD_WIDTH, bias=False)
        self.o = nn.Linear(HEADS * HEAD_WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, present = self.attend(self.attention_norm(x), angles, mask, past)
        x = x + self.o(mixed)
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y)), present

    def attend(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        query, key, value = (
            each(x).reshape(batch, length, -1, HEAD_WIDTH).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        query, key = rotate(query, *angles), rotate(key, *angles)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        scores = query @ shared(key).transpose(2, 3) * HEAD_WIDTH**-0.5 + mask
        mixed = functional.softmax(scores, dim=-1) @ shared(value)
        return mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_WIDTH), (key, value)


def shared(x: Tensor) -> Tensor:
    """Repeat each head of keys or values for the queries that read it."""
    batch, heads, length, width = x.shape
    repeated = x[:, :, None].expand(batch, heads, HEADS // heads, length, width)
    return repeated.reshape(batch, HEADS, length, width)


class Decoder(nn.Module):
    """Tokens int64 [N, T] to logits [N, T, characters]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = RMSNorm()
        cosines, sines = rotary_tables()
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        mask = torch.where(positions[:, None] >= positions, 0.0, torch.finfo(torch.float32).min)
        return self.run(tokens, positions, mask, [None] * DEPTH)[0]

    def run(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, Cache]:
        """positions: [T] or [N, 1, T]; mask: added to the scores."""
        x, angles, presents = self.embed(tokens), (self.cosines[positions], self.sines[positions]), []
        for block, each in zip(self.blocks, past, strict=True):
            x, present = block(x, angles, mask, each)
            presents.append(present)
        return functional.linear(self.norm(x), self.embed.weight), presents


class CachedDecoder(nn.Module):
    """The decoder with caches.

    Reads input_ids and position_ids [N, T], attention_mask [N, P + T] (zeros for padding) and, for each block, keys and
    values [N, SHARED_HEADS, P, HEAD_WIDTH] of the P tokens before. Returns logits, and keys and values of all tokens.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> list[Tensor]:
        length, total = input_ids.shape[1], attention_mask.shape[1]
        rows, columns = torch.arange(length)[:, None] + (total - length), torch.arange(total)
        seen = (rows >= columns) & (attention_mask[:, None, None, :] == 1)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        pairs = list(zip(past[::2], past[1::2], strict=True))
        logits, presents = self.decoder.run(input_ids, position_ids[:, None], mask, pairs)
        return [logits, *(tensor for pair in presents for tensor in pair)]
