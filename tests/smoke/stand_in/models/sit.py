"""In the place of REPA's network: its interface and its names of weights, written for the tests."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def mlp(*widths, between):
    parts = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), between())]
    return nn.Sequential(*parts[:-1])


def bare_norm(x, vectors):
    shift, scale = vectors
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulated(nn.Module):
    """Vectors [B, 1, D] of a condition."""

    def __init__(self, dim, count):
        super().__init__()
        self.count = count
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, count * dim))

    def vectors(self, c):
        return self.adaLN_modulation(c)[:, None].chunk(self.count, -1)


class Block(Modulated):
    def __init__(self, dim, heads, hidden):
        super().__init__(dim, 6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, hidden)

    def forward(self, x, c):
        v = self.vectors(c)
        x = x + v[2] * self.attn(bare_norm(x, v[:2]))
        return x + v[5] * self.mlp(bare_norm(x, v[3:5]))


class Final(Modulated):
    def __init__(self, dim, out):
        super().__init__(dim, 2)
        self.linear = nn.Linear(dim, out)

    def forward(self, x, c):
        return self.linear(bare_norm(x, self.vectors(c)))


class Embedder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class SiT(nn.Module):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, **options):
        super().__init__()
        self.patch, self.drop, self.tap = patch_size, options["class_dropout_prob"], options["encoder_depth"]
        self.classes, self.side = options["num_classes"], input_size // patch_size
        hidden, pixels = options["projector_dim"], in_channels * patch_size**2
        self.x_embedder = Embedder(proj=nn.Conv2d(in_channels, hidden_size, patch_size, patch_size))
        self.t_embedder = Embedder(mlp=mlp(256, hidden_size, hidden_size, between=nn.SiLU))
        self.y_embedder = Embedder(embedding_table=nn.Embedding(self.classes + 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, int(hidden_size * mlp_ratio)) for _ in range(depth))
        self.projectors = nn.ModuleList(mlp(hidden_size, hidden, hidden, z, between=nn.SiLU) for z in options["z_dims"])
        self.final_layer = Final(hidden_size, pixels)

    def forward(self, x, t, y):
        angles = t[:, None] * 10000 ** (-torch.arange(128) / 128)
        if self.training:
            y = torch.where(torch.rand(len(y)) < self.drop, self.classes, y)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1)) + self.y_embedder.embedding_table(y)
        h = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        for number, block in enumerate(self.blocks, 1):
            h = block(h, c)
            if number == self.tap:
                projected = [projector(h) for projector in self.projectors]
        pixels = self.final_layer(h, c).unflatten(-1, (self.patch, self.patch, -1)).unflatten(1, (self.side, self.side))
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3), projected
