"""Whatever is on its way at once, what comes out is what a plain loop gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from twotower.prefetch import AHEAD, PrefetchToDevice

CPU = torch.device("cpu")
BATCHES = [torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8) for _ in range(7)]


def tower() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 6)).eval()


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("ahead", [0, 1, AHEAD, 9])
def test_results_are_those_of_a_plain_loop_in_its_order(ahead: int, count: int) -> None:
    model = tower()
    pipeline = PrefetchToDevice(CPU)
    pipeline.ahead = ahead
    asked: list[int] = []

    def batches() -> Iterator[tuple[int, Tensor]]:
        for number, batch in enumerate(BATCHES[:count]):
            asked.append(number)
            yield number, batch

    with torch.inference_mode():
        expected = [model(batch / 255) for batch in BATCHES[:count]]
        run = pipeline.run(batches(), lambda item: model(pipeline.put(item[1]) / 255))
        for place, ((number, batch), result) in enumerate(run):
            assert number == place and batch is BATCHES[place]
            assert torch.equal(result, expected[place])
            # So many batches were begun before this result was handed out, and no more.
            assert len(asked) == min(count, place + 1 + ahead)
    assert len(asked) == count


def test_a_cpu_is_given_one_batch_at_a_time() -> None:
    pipeline = PrefetchToDevice(CPU)
    assert pipeline.ahead == 0 and pipeline.put(BATCHES[0]) is BATCHES[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_it_gives_without_haste() -> None:
    device = torch.device("cuda", 0)
    model = nn.Sequential(
        *[nn.Conv2d(3, 64, 3, padding=1), *[nn.Conv2d(64, 64, 3, padding=1)] * 20]
    )
    model = model.to(device).to(memory_format=torch.channels_last)
    pictures = torch.randint(0, 256, (40 * 16, 3, 224, 224), dtype=torch.uint8)
    loader = DataLoader(pictures, batch_size=16, pin_memory=True)
    pipeline = PrefetchToDevice(device)

    def forward(inputs: Tensor) -> Tensor:
        return model(inputs / 255).mean((2, 3))

    with torch.inference_mode():
        expected = [forward(batch.to(device)).cpu() for batch in loader]
        found = [result for _, result in pipeline.run(loader, lambda b: forward(pipeline.put(b)))]
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
