"""Settings: frozen dataclasses with named presets that refuse what they do not know."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Self

SEEDS = (-(2**63), 2**64 - 1)  # what torch.Generator.manual_seed takes


@dataclass(frozen=True)
class Settings:
    """Base of all settings.

    A subclass names its ``PRESETS`` (changes to the defaults), the ``CHOICES`` of its words and the
    ``LIMITS`` of its numbers, both included; None is no upper limit.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    LIMITS: ClassVar[dict[str, tuple[float, float | None]]] = {}
    given: ClassVar[set[str]]  # what was written, for `complete`; no field: equal stays equal

    def __new__(cls, *values: Any, **given: Any) -> Self:
        self = super().__new__(cls)
        names = [f.name for f in fields(cls)]
        object.__setattr__(self, "given", {*names[: len(values)], *given})
        return self

    def __post_init__(self) -> None:
        for name, allowed in self.CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        types = {f.name: f.type for f in fields(self)}
        for name, (low, high) in self.LIMITS.items():
            high = math.inf if high is None else high
            check_number(name, getattr(self, name), low, high, whole=types[name] == "int")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return the settings called `name`, with changes; changes that are None are ignored."""
        if name not in cls.PRESETS:
            raise ValueError(f"unknown preset {name!r}; allowed are {', '.join(cls.PRESETS)}")
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(changes) - set(names)):
            raise ValueError(
                f"unknown settings {', '.join(unknown)}; allowed are {', '.join(names)}"
            )
        changes = {key: value for key, value in changes.items() if value is not None}
        preset = cls(**(cls.PRESETS[name] | changes))
        object.__setattr__(preset, "given", set(names))
        return preset

    def complete(self, preset: str) -> Self:
        """Return these settings, and the preset's in place of those that were not given.

        ``InversionSettings(steps=300).complete("tiny")`` has the batch and the learning rate of
        ``tiny``. Settings that come from `preset` are complete already.
        """
        return self.preset(preset, **{name: getattr(self, name) for name in self.given})

    @property
    def open_end(self) -> tuple[str, ...]:
        """Name the settings that a longer run may change: ``steps``, if no schedule ends there."""
        return ("steps",) if getattr(self, "schedule", "constant") == "constant" else ()

    def without(self, *names: str) -> dict[str, Any]:
        """Return all settings but some, to tell one run from another."""
        return {key: value for key, value in asdict(self).items() if key not in names}


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, whole: bool = False
) -> None:
    """Raise ValueError unless `value` is a finite number from `low` to `high`."""
    if not isinstance(value, Integral if whole else Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a {'whole ' * whole}number, got {value!r}")
    number: Any = value
    if not low <= number <= high or abs(number) == math.inf:
        limits = "a finite number such as 2"
        if low > -math.inf:
            limits = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")


def check_counts(**counts: int) -> None:
    """Raise ValueError for a count below 1."""
    for name, value in counts.items():
        check_number(name, value, 1, whole=True)


def check_seed(seed: int, n: int = 1) -> int:
    """Return `seed` if PyTorch takes it and the `n` - 1 seeds that follow it, else raise."""
    check_number("seed", seed, *SEEDS, whole=True)
    check_number("the last image's seed", int(seed) + n - 1, *SEEDS)
    return int(seed)


def list_seeds(seed: int, n: int) -> range:
    """Return the seeds of `n` images, the first of them `seed`; see `check_seed`."""
    first = check_seed(seed, n)
    return range(first, first + n)
