"""A training run that stops between two steps, and goes on from its checkpoint."""

from __future__ import annotations

import io
import os
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medbudget.files import atomic_path, check_writable, describe_difference, hold
from medbudget.progress import tqdm


class Stopped(KeyboardInterrupt):
    """A run ended by Ctrl-C (SIGINT) or SIGTERM; the message says how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number: int = number


class Steps:
    """Iterate over the steps of a run that are still to do; save them, and stop between them.

    Ctrl-C and SIGTERM end the run after the current step, once its checkpoint is saved; a second
    one ends it at once. `run` has ``step``, the steps done, ``state_dict()`` and
    ``load_state_dict(state)``; a step comes again where the loop's body has not raised ``step``. The
    `checkpoint` is saved every `every` steps, when the run is stopped, and at the end; if the file
    exists, the run goes on from it, unless it is of another `identity`.

    Examples
    --------
    >>> class Counter:
    ...     step = 0
    ...     state_dict = lambda self: {"step": self.step}
    >>> run = Counter()
    >>> for step in Steps(run, 3, desc="count"):
    ...     run.step += 1
    >>> run.step
    3
    """

    def __init__(
        self, run: Any, total: int, *, checkpoint: str | os.PathLike[str] | None = None,
        identity: Mapping[str, Any] | None = None, every: int = 500, desc: str = "",
    ) -> None:  # fmt: skip
        self.run, self.total, self.every, self.desc = run, total, every, desc
        self.path = None if checkpoint is None else check_writable(checkpoint)
        self.identity = dict(identity or {})
        self.signals: list[int] = []

    def __iter__(self) -> Iterator[int]:
        with hold(self.path):
            if self.path is not None and self.path.exists():
                self.run.load_state_dict(load_checkpoint(self.path, self.identity))
            saved = self.run.step
            bar = tqdm(total=self.total, initial=self.run.step, desc=self.desc, unit="step")
            with bar, self._late_signals():
                while self.run.step < self.total and not self.signals:
                    before = self.run.step
                    yield before
                    bar.set_postfix_str(getattr(self.run, "note", ""), refresh=False)
                    bar.update(self.run.step - before)
                    if self.run.step // self.every > before // self.every:
                        saved = self._save()
                if saved != self.run.step:
                    self._save()
        if self.signals:
            how = "run the same again to go on from" if self.path else "nothing is kept without"
            raise Stopped(
                f"stopped at step {self.run.step} of {self.total}; {how} "
                f"{self.path or 'a checkpoint: name a file for it'}",
                self.signals[0],
            )

    @contextmanager
    def _late_signals(self) -> Iterator[None]:
        """Note signals instead of raising at once; only the main thread gets any."""
        before: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            if self.signals:
                raise Stopped(f"stopped within step {self.run.step + 1}", number)
            self.signals.append(number)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for caught, handler in before.items():
                signal.signal(caught, handler)

    def _save(self) -> int:
        if self.path is not None:
            with atomic_path(self.path) as temporary:
                content = io.BytesIO()  # written at once, so that a full disk says its own name
                torch.save({"identity": self.identity, "state": self.run.state_dict()}, content)
                temporary.write_bytes(content.getbuffer())
        return self.run.step


def load_checkpoint(
    path: str | os.PathLike[str], identity: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the state in a checkpoint of `Steps`, on the CPU.

    A damaged file, or one of another `identity`, raises ValueError, which says what differs.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, weights_only=True, map_location="cpu")
        stored, state = content["identity"], content["state"]
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} is no readable checkpoint ({error}); name another, or remove it to start anew"
        ) from None
    if identity is not None and stored != dict(identity):
        pairs = {key: (stored.get(key), identity.get(key)) for key in {**identity, **stored}}
        differ = [
            describe_difference(old, new)
            if isinstance(old, dict) and isinstance(new, dict)
            else key
            for key, (old, new) in pairs.items()
            if old != new
        ]
        raise ValueError(
            f"checkpoint {path} belongs to another run: {', '.join(differ)} differ; name another "
            "checkpoint, or remove this one to start anew"
        )
    return state


def draw_indices(n: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Return which of n images a step sees: shuffled anew each epoch, by seed and step alone."""
    order: list[int] = []
    while len(order) < batch_size:
        epoch, start = divmod(step * batch_size + len(order), n)
        shuffle = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
        order += torch.randperm(n, generator=shuffle)[start:].tolist()[: batch_size - len(order)]
    return torch.tensor(order)
