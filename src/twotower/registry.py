"""Registries: which build function makes what a config asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from twotower.settings import Choice

T = TypeVar("T")
Build = TypeVar("Build", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Build functions by name, each chosen by the type of its config.

    A module registers its function beside its config class; the package's `__init__` imports the
    module. `hydra_app.py` offers every registered class as a Hydra group of the registry's name.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self._classes: dict[str, type[Choice]] = {}
        self._builds: dict[type[Choice], Callable[..., T]] = {}

    def register(self, name: str, config_class: type[Choice]) -> Callable[[Build], Build]:
        """Decorate the function that builds from a `config_class`, its first argument.

        Raises:
            ValueError: the name or the class is registered already.
        """
        if name in self._classes or config_class in self._builds:
            raise ValueError(f"{self.group}: {name} is registered twice")

        def decorate(build: Build) -> Build:
            config_class.registered_name = name
            self._classes[name] = config_class
            self._builds[config_class] = build
            return build

        return decorate

    def build(self, config: Choice, *args: Any, **kwargs: Any) -> T:
        """Call the function that is registered for the type of `config`.

        Raises:
            KeyError: the type is not registered.
        """
        return self._builds[type(config)](config, *args, **kwargs)

    def config_class(self, name: str) -> type[Choice]:
        """The config class of a name.

        Raises:
            KeyError: no such name.
        """
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)
