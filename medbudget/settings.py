"""Settings: frozen dataclasses with named presets that refuse what they do not know."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, fields
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
        for name, (low, high) in self.LIMITS.items():
            value = getattr(self, name)
            limit = math.inf if high is None else high
            if not (low <= value <= limit and math.isfinite(value)):
                limits = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name} must be {limits}, got {value}")

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
        given = self.given
        return self.preset(preset, **{name: getattr(self, name) for name in given})

    @property
    def open_end(self) -> tuple[str, ...]:
        """Name the settings that a longer run may change: ``steps``, if no schedule ends there."""
        return ("steps",) if getattr(self, "schedule", "constant") == "constant" else ()

    def without(self, *names: str) -> dict[str, Any]:
        """Return all settings but some, to tell one run from another."""
        return {key: value for key, value in asdict(self).items() if key not in names}


def check_seed(seed: int, n: int = 1) -> int:
    """Return `seed` if PyTorch takes it and the `n` - 1 seeds that follow it, else raise."""
    try:
        first = operator.index(seed)
    except TypeError:
        raise ValueError(f"a seed is a whole number such as 0, got {seed!r}") from None
    for value in (first, first + n - 1):
        if not SEEDS[0] <= value <= SEEDS[1]:
            raise ValueError(
                f"seed {value} is beyond what PyTorch takes, -2^63 to 2^64 - 1; choose a smaller "
                "one such as 0"
            )
    return first
