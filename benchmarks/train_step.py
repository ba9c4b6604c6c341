"""Training steps a second, ours beside open_clip's, on the same CLIP, captions and batch.

    python benchmarks/train_step.py                     # two threads, fp32, 27 M parameters
    python benchmarks/train_step.py --device cuda --architecture ViT-B/32 --precision bf16 --compile

A step is what a training loop does between two batches: move the batch to the device, forward,
loss, backward, clipping, AdamW, clamp. Theirs is open_clip's: its model and `ClipLoss`, captions
padded to 77 tokens, torch's AdamW. Ours is `Stepper`, fed by `Collate`. Both begin from the same
weights and take turns, a step each; the losses of the first steps are printed, and are equal.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from open_clip import CLIP, SimpleTokenizer
from open_clip.loss import ClipLoss
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from twotower.checkpoint.clip import Architecture
from twotower.data.pairs import Collate, Sample
from twotower.model_config import BatchNorm
from twotower.models.openai_clip import build_towers, load_openai_weights
from twotower.models.openai_tokenizer import OpenAITokenizer
from twotower.models.preprocess import OPENAI_MEAN, OPENAI_STD, ImageInput
from twotower.train_config import Precision, TrainConfig
from twotower.training.gradient import Inputs
from twotower.training.loss import LOSSES, ClipLossConfig
from twotower.training.stepper import Stepper

WORDS = (
    *("a", "man", "woman", "dog", "child", "in", "red", "blue", "shirt", "on", "the", "beach"),
    *("street", "with", "two", "of", "running", "ball"),
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "small": {
        "embed_dim": 256,
        "vision": {"layers": 6, "width": 384, "patch_size": 16, "image_size": 112},
        "text": {"width": 256, "heads": 4, "layers": 4},
    },
    "ViT-B/32": {
        "embed_dim": 512,
        "vision": {"layers": 12, "width": 768, "patch_size": 32, "image_size": 224},
        "text": {"width": 512, "heads": 8, "layers": 12},
    },
    "RN50": {
        "embed_dim": 1024,
        "vision": {"layers": (3, 4, 6, 3), "width": 64, "patch_size": None, "image_size": 224},
        "text": {"width": 512, "heads": 8, "layers": 12},
    },
}


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=[p.name for p in Precision], default="fp32")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    captions, pictures = make_batch(options)
    model = build(options.architecture).to(device)
    theirs = their_step(model, captions, pictures, options, device)
    ours = our_step(build(options.architecture), captions, pictures, options, device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    write(
        f"{options.architecture}, {millions:.1f} M parameters, batch {options.batch}, "
        f"{options.precision}, {options.device}, {options.threads} threads"
    )
    steps = {"open_clip": theirs, "twotower": ours}
    losses = {name: [step(), step()] for name, step in steps.items()}
    write(f"losses of two steps: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        for name in list(steps) if number % 2 else reversed(list(steps)):
            seconds[name].append(timed(steps[name], device))
    rates = {name: options.batch / statistics.median(found) for name, found in seconds.items()}
    for name, rate in rates.items():
        low, high = (options.batch / f(seconds[name]) for f in (max, min))
        write(
            f"{name:>10}: {rate:9.1f} samples/s (median of {options.rounds}; {low:.1f}-{high:.1f})"
        )
    ratios = [a / b for a, b in zip(seconds["open_clip"], seconds["twotower"], strict=True)]
    write(f"ratio of ours to theirs: {statistics.median(ratios):.2f} (median over the rounds)")


def write(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def timed(step: Callable[[], float], device: torch.device) -> float:
    """Seconds of a step, the device's work included."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_batch(options: argparse.Namespace) -> tuple[list[str], Tensor]:
    """Captions of 5 to 20 words, as Flickr8k's are, and uint8 pictures."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 21, (options.batch,), generator=generator).tolist()
    words = [torch.randint(len(WORDS), (length,), generator=generator) for length in lengths]
    size = ARCHITECTURES[options.architecture]["vision"]["image_size"]
    shape = (options.batch, 3, size, size)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return [" ".join(WORDS[i] for i in chosen.tolist()) for chosen in words], pictures


def build(name: str) -> CLIP:
    """open_clip's model with the same weights each time."""
    torch.manual_seed(0)
    chosen = ARCHITECTURES[name]
    vision = CLIPVisionCfg(**chosen["vision"])
    return CLIP(chosen["embed_dim"], vision, CLIPTextCfg(**chosen["text"]), quick_gelu=True)


def autocast(options: argparse.Namespace, device: torch.device) -> Any:
    """The context of a forward pass."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype, enabled=options.precision != "fp32")


def their_step(
    model: CLIP,
    captions: list[str],
    pictures: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> Callable[[], float]:
    """The step of open_clip's training loop."""
    tokens = SimpleTokenizer()(captions)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    images = (pictures / 255 - mean) / std  # their loader normalises
    loss_of = ClipLoss()
    plain = [p for p in model.parameters() if p.ndim < 2]
    others = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.2}],
        lr=5e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    forward = torch.compile(model) if options.compile else model
    model.train()

    def step() -> float:
        moved, ids = images.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
        optimizer.zero_grad()
        with autocast(options, device):
            loss = loss_of(*forward(moved, ids)[:3])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return float(loss.detach())

    return step


def our_step(
    model: CLIP,
    captions: list[str],
    pictures: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> Callable[[], float]:
    """The step of our trainer, from the same weights."""
    chosen = ARCHITECTURES[options.architecture]
    vision, text = chosen["vision"], chosen["text"]
    architecture = Architecture(
        embed_dim=chosen["embed_dim"],
        image_size=vision["image_size"],
        vision_layers=vision["layers"],
        vision_width=vision["width"],
        patch_size=vision["patch_size"],
        context_length=77,
        vocab_size=49408,
        text_width=text["width"],
        text_layers=text["layers"],
    )
    picture = ImageInput(size=vision["image_size"])
    encoder = build_towers(architecture, picture, quick_gelu=True)
    load_openai_weights(encoder, model.state_dict(), "open_clip")
    encoder = encoder.to(device).to(memory_format=torch.channels_last)
    tokenizer = OpenAITokenizer()
    samples = [
        Sample(picture, caption, row)
        for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
    ]
    batch = Collate(tokenizer, tokenizer.pad_id)(samples)
    config = TrainConfig(
        batch_size=options.batch,
        precision=Precision[options.precision],
        compile=options.compile,
    )
    loss = LOSSES.build(ClipLossConfig())
    stepper = Stepper(encoder, BatchNorm.local, loss, config, device)
    stepper.train()

    def step() -> float:
        inputs = Inputs(
            images=batch.images.to(device, non_blocking=True),
            tokens=batch.tokens.to(device, non_blocking=True),
            keys=batch.keys.to(device, non_blocking=True),
        )
        return stepper.step(inputs, 5e-4).loss

    return step


if __name__ == "__main__":
    main()
