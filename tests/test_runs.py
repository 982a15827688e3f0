"""Settings, and runs that stop between steps, are saved, and go on."""

import copy
import signal
from dataclasses import dataclass, replace

import pytest
import torch

from medbudget.runs import Steps, Stopped, draw_indices, load_checkpoint
from medbudget.settings import Settings


@dataclass(frozen=True)
class Soup(Settings):
    """Settings of a test."""

    salt: float = 2.0
    kind: str = "hot"
    steps: int = 10
    schedule: str = "constant"

    PRESETS = {"paper": {}, "tiny": {"steps": 3, "salt": 1.0}}
    CHOICES = {"kind": ("hot", "cold")}
    LIMITS = {"steps": (1, None), "salt": (0, 5)}


def test_presets_change_the_defaults_and_take_changes():
    assert Soup.preset("paper") == Soup()
    assert Soup.preset("tiny", salt=3, kind=None) == Soup(salt=3, steps=3)
    with pytest.raises(ValueError, match="unknown preset 'huge'; allowed are paper, tiny"):
        Soup.preset("huge")
    with pytest.raises(ValueError, match="unknown settings pepper; allowed are salt, kind, steps"):
        Soup.preset("tiny", pepper=1)


def test_what_is_not_given_comes_from_the_preset():
    assert Soup(steps=7).complete("tiny") == Soup(steps=7, salt=1.0)
    assert Soup(2.0).complete("tiny") == Soup(salt=2.0, steps=3)  # given, though the default
    assert Soup().complete("tiny") == Soup.preset("tiny")
    assert Soup.preset("paper", steps=4).complete("tiny") == Soup(steps=4)
    whole = replace(Soup(), steps=5)  # names every field
    assert whole.complete("tiny") == whole
    assert copy.copy(Soup(steps=7)).complete("tiny").salt == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "warm"}, "kind must be one of hot, cold, got 'warm'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"salt": 6}, "salt must be 0 to 5, got 6"),
        ({"salt": float("nan")}, "salt must be 0 to 5, got nan"),
        ({"steps": float("inf")}, "steps must be at least 1, got inf"),
    ],
)
def test_wrong_settings_say_what_is_allowed(change, message):
    with pytest.raises(ValueError, match=message):
        Soup(**change)


def test_a_longer_run_differs_only_where_a_schedule_ends():
    assert Soup().without("steps") == {"salt": 2.0, "kind": "hot", "schedule": "constant"}
    assert Soup().open_end == ("steps",) and Soup(schedule="linear").open_end == ()


class Walk:
    """Adds a random number at each step, a function of the step."""

    def __init__(self):
        self.step, self.place = 0, torch.zeros(())

    def go(self):
        self.place = self.place * 0.5 + torch.randn(
            (), generator=torch.Generator().manual_seed(self.step)
        )
        self.step += 1

    def state_dict(self):
        return {"step": self.step, "place": self.place}

    def load_state_dict(self, state):
        self.step, self.place = state["step"], state["place"]


def walk(total, checkpoint=None, signals=(), identity=None, every=2):
    run, steps = Walk(), []
    for step in Steps(run, total, checkpoint=checkpoint, identity=identity, every=every):
        steps.append(step)
        for number in signals if step == 2 else ():
            signal.raise_signal(number)
        run.go()
    return run, steps


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path):
    whole, steps = walk(7)
    assert steps == list(range(7)) and whole.step == 7
    path = tmp_path / "deep" / "x.ckpt"
    with pytest.raises(Stopped, match=r"stopped at step 3 of 7; run the same again .*x\.ckpt"):
        walk(7, path, [signal.SIGINT])
    assert load_checkpoint(path)["step"] == 3
    resumed, steps = walk(7, path)
    assert steps == [3, 4, 5, 6] and torch.equal(resumed.place, whole.place)
    assert [p.name for p in path.parent.iterdir()] == ["x.ckpt"]
    torch.save({"step": 3}, tmp_path / "y.ckpt")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        walk(4, tmp_path / "y.ckpt")
    assert walk(7, path)[1] == []
    assert walk(9, path)[1] == [7, 8]


def test_sigterm_is_like_ctrl_c_and_the_second_signal_does_not_wait():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="nothing is kept without a checkpoint") as stop:
        walk(7, None, [signal.SIGTERM])
    assert stop.value.number == signal.SIGTERM and isinstance(stop.value, KeyboardInterrupt)
    with pytest.raises(Stopped, match="within step 3"):
        walk(7, None, [signal.SIGINT, signal.SIGINT])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_an_error_in_a_step_keeps_the_last_checkpoint_and_frees_the_lock(tmp_path):
    run, path = Walk(), tmp_path / "x.ckpt"
    with pytest.raises(ZeroDivisionError):
        for step in Steps(run, 9, checkpoint=path, every=2):
            assert step < 5 or 1 / 0
            run.go()
    assert load_checkpoint(path)["step"] == 4
    assert walk(9, path)[1] == [4, 5, 6, 7, 8]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_was_not_done_comes_again():
    run, steps = Walk(), []
    for step in Steps(run, 3):
        steps.append(step)
        if steps.count(1) == 2 or step != 1:
            run.go()
    assert steps == [0, 1, 1, 2]


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    path = tmp_path / "x.ckpt"
    mine = {"settings": {"lr": 0.1, "batch": 2}, "base": "a1b2", "images": "c3d4"}
    walk(2, path, identity=mine)
    content = path.read_bytes()
    other = {"settings": {"lr": 0.2, "batch": 2}, "base": "a1b2", "images": "0000"}
    with pytest.raises(
        ValueError, match=r"another run: lr \(0\.1 there, 0\.2 now\), images differ"
    ):
        walk(2, path, identity=other)
    assert path.read_bytes() == content
    assert walk(4, path, identity=mine)[1] == [2, 3]


@pytest.mark.parametrize("place", [0, 30, 700, -700, -1])
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_damaged_checkpoint_is_refused_or_harmless(tmp_path, how, place):
    path = tmp_path / "x.ckpt"
    want = walk(4, path)[0].place
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[place] ^= 4
    path.write_bytes(content[:place] if how == "cut" else content)
    try:
        state = load_checkpoint(path)
    except ValueError as error:
        assert "no readable checkpoint" in str(error) and "remove it to start anew" in str(error)
    else:
        assert how == "flip" and state["step"] == 4 and torch.equal(state["place"], want)


def test_every_image_is_seen_once_an_epoch():
    epochs = [torch.cat([draw_indices(6, 2, 3 * e + i, seed=0) for i in range(3)]) for e in (0, 1)]
    assert all(sorted(epoch.tolist()) == list(range(6)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert sorted(draw_indices(2, 5, 0, seed=1).tolist()) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
