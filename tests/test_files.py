"""The one rule against overwriting: what is there stays, unless it is what this call would make."""

import json
import threading

import pytest

from medbudget.files import (
    InUseError,
    check_apart,
    check_output,
    check_writable,
    describe_difference,
    hold,
    write_json,
)


def read(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def test_nothing_is_replaced_but_what_this_call_would_make(tmp_path):
    path = tmp_path / "new" / "x.json"
    assert not check_output(path, {"steps": 25}, read) and path.parent.is_dir()
    write_json(path, {"steps": 25, "seed": 0})
    assert check_output(path, {"steps": 25, "seed": 0}, read)
    with pytest.raises(FileExistsError, match=r"x\.json is there already, made with other settings: "
                       r"steps \(25 there, 50 now\); choose another place, or add --overwrite"):  # fmt: skip
        check_output(path, {"steps": 50, "seed": 0}, read)
    with pytest.raises(FileExistsError, match=r"is there already; choose"):
        check_output(path)
    assert not check_output(path, {"steps": 50}, read, overwrite=True)
    path.write_text("a thesis")
    with pytest.raises(FileExistsError, match=r"is there already; choose"):
        check_output(path, {"steps": 25}, read)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        check_output(tmp_path / "link")
    assert path.read_text() == "a thesis"


def test_an_output_is_never_an_input_nor_inside_one(tmp_path):
    (tmp_path / "images").mkdir()
    for out in ("images", "images/made", "images/../images/x.png"):
        with pytest.raises(ValueError, match=r"lies inside the input .*images.*another place"):
            check_apart(tmp_path / out, None, tmp_path / "images")
    check_apart(tmp_path / "images2", tmp_path / "images", tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="lies inside"):
        check_apart(tmp_path / "a.png", tmp_path / "a.png")


def test_a_difference_names_what_was_added_and_left_out():
    stored, wanted = {"steps": 25, "seed": 0, "old": 1}, {"steps": 50, "seed": 0, "new": 2}
    expected = "steps (25 there, 50 now), new (None there, 2 now), old (1 there, None now)"
    assert describe_difference(stored, wanted) == expected


def test_a_folder_that_is_a_file_is_called_so(tmp_path):
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(OSError, match=r"x\.safetensors is a file"):
        check_writable(tmp_path / "x.safetensors" / "00000.png")


def test_a_second_holder_is_refused_or_waits(tmp_path):
    order = []

    def wait():
        with hold(tmp_path, wait=True):
            order.append("second")

    with hold(tmp_path):
        with pytest.raises(InUseError, match="being written by another process"), hold(tmp_path):
            pass
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and not list(tmp_path.iterdir())
