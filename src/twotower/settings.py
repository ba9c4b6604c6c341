"""What a config is made of: fields with a meaning and bounds, sections that check them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

T = TypeVar("T")


class ConfigError(Exception):
    """A mistake of the user's: printed as one sentence, exit code 1, no traceback."""


class Diverged(ConfigError):
    """Training came to a loss or a gradient that is not finite: these settings do not train."""


def setting(
    default: T,
    meaning: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> T:
    """Declare a field of a `Section`: its default, its meaning with its unit, and its bounds.

    Typed as the default's type so that a type checker sees the field as what it holds.
    """
    bounds = {"gt": gt, "ge": ge, "le": le, "lt": lt}
    metadata = {"meaning": meaning, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    if isinstance(default, list):
        made: Any = dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    else:
        made = dataclasses.field(default=default, metadata=metadata)
    return made  # type: ignore[no-any-return]


def plain_number(value: float) -> str:
    """A bound as a person writes it: a whole number with all its digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "gt": ("greater than", lambda value, bound: value > bound),
    "ge": ("at least", lambda value, bound: value >= bound),
    "lt": ("less than", lambda value, bound: value < bound),
    "le": ("at most", lambda value, bound: value <= bound),
}


@dataclass(kw_only=True)
class Section:
    """One section of the config; checks its bounds when it is made.

    Raises:
        ConfigError: a value is outside the bounds of its field.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, list) else [value]
            for kind, bound in field.metadata.get("bounds", {}).items():
                words, holds = _BOUNDS[kind]
                for item in values:
                    if not holds(item, bound):
                        key = f"{self.section}.{field.name}"
                        raise ConfigError(
                            f"{key} must be {words} {plain_number(bound)}, not {item}"
                        )


@dataclass(kw_only=True)
class Choice(Section):
    """A section whose class is chosen by a config group; a registry fills in `registered_name`."""

    registered_name: ClassVar[str] = ""


SectionT = TypeVar("SectionT", bound=Section)


def to_plain(section: Section) -> dict[str, Any]:
    """A section as JSON can hold it: enums by name."""
    plain = dataclasses.asdict(section)
    return {k: v.name if isinstance(v, enum.Enum) else v for k, v in plain.items()}


def from_plain(config_class: type[SectionT], plain: dict[str, Any]) -> SectionT:
    """The section that `to_plain` wrote.

    Raises:
        ConfigError: a key or a name that the class does not have, or a value outside its bounds.
    """
    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for key, value in plain.items():
        if key not in hints:
            raise ConfigError(
                f"{config_class.section}.{key} is not known to this version of twotower"
            )
        hint = hints[key]
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            if value not in hint.__members__:
                raise ConfigError(
                    f"{config_class.section}.{key}={value} is not known to this version of "
                    f"twotower, which knows {', '.join(hint.__members__)}"
                )
            value = hint[value]
        values[key] = value
    return config_class(**values)
