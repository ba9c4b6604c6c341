"""Which module went bad first, once a loss or a gradient is no longer finite.

Ordinary steps carry no hooks: a bad step is run once more with them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

MANY = 3  # modules named at most, where several share what went bad


def name_bad_module(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """Name what went bad first: a weight, a module's output, the loss, or a module's gradient.

    Args:
        model: the module itself, not its DDP wrapper, with the weights of the bad step.
        run: the forward pass of the bad step's batch once more, through `model`; returns the loss.
            With several ranks it must not communicate, or every rank must be here.

    Returns:
        For example `text_tower.trunk.layer.3.attention: its output is NaN`; None if everything is
        finite this time. Gradients, buffers and the random state are afterwards as they were.
    """
    if found := bad_weight(model):
        return found
    watch = _Watch(model)
    with _put_back(model), watch.hooks():
        try:
            loss = run()
            watch.forward = False
            if watch.found is None and (kind := _bad(loss)):
                watch.found = f"the loss: it is {kind} while every module's output is finite"
            if watch.found is None:
                torch.autograd.backward(loss)
        except RuntimeError as error:  # out of memory, say: what was found until then must do
            log.warning("the bad step could not be run again to its end: %s", error)
    return watch.found


def bad_weight(model: nn.Module) -> str | None:
    """The first parameter that is not finite, or buffer that holds NaN, and how many more are."""
    found = [f"{name}: it is {kind}" for name, p in model.named_parameters() if (kind := _bad(p))]
    # Attention masks are buffers that hold infinities.
    buffers = [name for name, b in model.named_buffers() if _bad(b) == "NaN"]
    found += [f"{name}: it is NaN" for name in buffers]
    if not found:
        return None
    more = f", and so are {len(found) - 1} more weights" if len(found) > 1 else ""
    return f"{found[0]} before the step{more}"


def _bad(tensor: Tensor) -> str:
    """`NaN` or `infinite` if an element is; else empty."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return ""
    return "NaN" if bool(tensor.isnan().any()) else "infinite"


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Within it, gradients are gathered anew; after it, all is as before it."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    for parameter, _ in gradients:
        parameter.grad = None
    with torch.random.fork_rng(sorted(devices)), torch.enable_grad():
        yield
    for parameter, gradient in gradients:
        parameter.grad = gradient
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


class _Watch:
    """Looks at what passes between modules, in the order of execution, until something is bad.

    Forward, the first to complete with a bad output is the innermost module that made it. Backward,
    the first bad gradient of a tensor was made by what consumed the tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: str | None = None
        self.forward = True  # activations that are computed again backwards are not looked at
        self._model = model
        self._names = {module: name or "the model" for name, module in model.named_modules()}
        self._passed: dict[tuple[int, int], tuple[Tensor, str, list[str]]] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                look = partial(self._parameter, name)
                handles.append(parameter.register_hook(look))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.forward:
            return
        name = self._names[module]
        for tensor in _tensors((args, kwargs)):
            # Masks are inputs that hold negative infinities.
            kind = _bad(tensor.detach().clamp(min=0)) if tensor.is_floating_point() else ""
            if kind and self.found is None:
                parent = name.rpartition(".")[0] or "the model"
                passed = f"{parent}: what it passes to {name} is {kind}"
                self.found = f"the batch: it is {kind}" if module is self._model else passed
            self._follow(tensor, "")[2].append(name)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.forward:
            return
        name = self._names[module]
        for tensor in _tensors(output):
            if self.found is None and (kind := _bad(tensor)):
                self.found = f"{name}: its output is {kind}"
            self._follow(tensor, name)

    def _follow(self, tensor: Tensor, producer: str) -> tuple[Tensor, str, list[str]]:
        """Look at the gradient of a tensor, once; keeping the tensor keeps its id its own."""
        key = id(tensor), tensor._version  # which a module in place changes
        if key not in self._passed:
            self._passed[key] = (tensor, producer, [])
            if tensor.requires_grad:
                look = partial(self._gradient, key)
                tensor.register_hook(look)  # type: ignore[no-untyped-call]
        return self._passed[key]

    def _gradient(self, key: tuple[int, int], gradient: Tensor) -> None:
        if self.found is not None or not (kind := _bad(gradient)):
            return
        _, producer, consumers = self._passed[key]
        inner = [c for c in consumers if not any(o.startswith(f"{c}.") for o in consumers)]
        inner = list(dict.fromkeys(name for name in inner if name != "the model"))
        if inner:
            self.found = f"{' or '.join(inner[:MANY])}: the gradient of its input is {kind}"
        else:
            self.found = (
                f"{producer}: the gradient of its output is {kind}, so what is computed from it "
                "goes wrong backwards"
            )

    def _parameter(self, name: str, gradient: Tensor) -> None:
        if self.found is None and (kind := _bad(gradient)):
            self.found = f"{name}: its gradient is {kind}"
