"""CLIP's forward pass a second time, in plain tensor operations on the state dict."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def attention(x: Tensor, w: Weights, name: str, mask: Tensor | None) -> Tensor:
    """Multi-head attention over (B, L, C) with one head per 64 channels."""
    batch, length, width = x.shape
    heads = width // 64
    qkv = x @ w[f"{name}.in_proj_weight"].T + w[f"{name}.in_proj_bias"]
    q, k, v = (t.view(batch, length, heads, 64).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    scores = q @ k.transpose(-1, -2) / 8
    if mask is not None:
        scores = scores + mask
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return mixed @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def transformer(
    x: Tensor, w: Weights, name: str, act: Callable[[Tensor], Tensor], mask: Tensor | None = None
) -> Tensor:
    layer = 0
    while f"{name}.resblocks.{layer}.ln_1.weight" in w:
        block = f"{name}.resblocks.{layer}"
        x = x + attention(norm(x, w, f"{block}.ln_1"), w, f"{block}.attn", mask)
        hidden = norm(x, w, f"{block}.ln_2")
        hidden = act(hidden @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"])
        x = x + hidden @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
        layer += 1
    return x


def encode_text(w: Weights, tokens: Tensor, act: Callable[[Tensor], Tensor] = quick_gelu) -> Tensor:
    length = tokens.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    x = norm(transformer(x, w, "transformer", act, mask), w, "ln_final")
    return x[torch.arange(len(tokens)), tokens.argmax(-1)] @ w["text_projection"]


def encode_image_vit(
    w: Weights, images: Tensor, act: Callable[[Tensor], Tensor] = quick_gelu
) -> Tensor:
    kernel = w["visual.conv1.weight"]
    x = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = w["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + w["visual.positional_embedding"]
    x = transformer(norm(x, w, "visual.ln_pre"), w, "visual.transformer", act)
    return norm(x[:, 0], w, "visual.ln_post") @ w["visual.proj"]


def conv_norm(x: Tensor, w: Weights, conv: str, bn: str, stride: int = 1) -> Tensor:
    kernel = w[f"visual.{conv}.weight"]
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (w[f"visual.{bn}.{n}"].view(-1, 1, 1) for n in names)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def bottleneck(x: Tensor, w: Weights, name: str, stride: int) -> Tensor:
    y = conv_norm(x, w, f"{name}.conv1", f"{name}.bn1").relu()
    y = conv_norm(y, w, f"{name}.conv2", f"{name}.bn2").relu()
    y = conv_norm(F.avg_pool2d(y, stride), w, f"{name}.conv3", f"{name}.bn3")
    if f"visual.{name}.downsample.0.weight" in w:
        x = conv_norm(F.avg_pool2d(x, stride), w, f"{name}.downsample.0", f"{name}.downsample.1")
    return (x + y).relu()


def attention_pool(x: Tensor, w: Weights) -> Tensor:
    """(B, C, H, W) -> (B, D): the mean position asks all positions."""
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + w["visual.attnpool.positional_embedding"]
    parts = ("q_proj", "k_proj", "v_proj")
    joined = {
        "a.in_proj_weight": torch.cat([w[f"visual.attnpool.{p}.weight"] for p in parts]),
        "a.in_proj_bias": torch.cat([w[f"visual.attnpool.{p}.bias"] for p in parts]),
        "a.out_proj.weight": w["visual.attnpool.c_proj.weight"],
        "a.out_proj.bias": w["visual.attnpool.c_proj.bias"],
    }
    return attention(x, joined, "a", None)[:, 0]


def encode_image_resnet(w: Weights, images: Tensor) -> Tensor:
    x = conv_norm(images, w, "conv1", "bn1", stride=2).relu()
    x = conv_norm(x, w, "conv2", "bn2").relu()
    x = F.avg_pool2d(conv_norm(x, w, "conv3", "bn3").relu(), 2)
    for stage in (1, 2, 3, 4):
        block = 0
        while f"visual.layer{stage}.{block}.conv1.weight" in w:
            x = bottleneck(x, w, f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1)
            block += 1
    return attention_pool(x, w)
