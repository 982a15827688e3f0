"""A reader study's exported page, read in a real browser from file://, and brought back."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from webdriver import ARROW_LEFT, ARROW_RIGHT, ESCAPE, needs_browser, open_browser, until

from medbudget import save_images
from medbudget.reader import ReaderStudy

pytestmark = needs_browser

PROGRESS = "return document.querySelector('#progress').innerText"
SOURCES = "return [...document.querySelectorAll('#images img')].map(i => i.src)"


@pytest.fixture
def study(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8, generator=generator)
        save_images(images, tmp_path / name)
    return ReaderStudy.create(tmp_path / "a", tmp_path / "b", tmp_path / "s", seed=2, n_pairs=10)


@pytest.fixture
def page(study, tmp_path):
    study.export(tmp_path / "page.html")
    return (tmp_path / "page.html").as_uri()


def start(browser, page, reader):
    browser.open(page)
    browser.type("#reader", reader)
    browser.click("#start button")


def wait_for_pair(browser, number, total=11):
    browser.wait_for(
        f"return document.querySelector('#progress').innerText === 'Pair {number} of {total}' && !busy",
        f"pair {number} does not show",
    )


def test_a_study_read_by_keys_and_clicks_comes_back(study, page, tmp_path):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    with open_browser(downloads=downloads) as browser:
        start(browser, page, "eve")
        wait_for_pair(browser, 1)
        assert browser.run(SOURCES) == study.urls(0)
        wide, shown = browser.run(
            "const i = document.querySelector('#left'); return [i.width, i.naturalWidth]"
        )
        assert shown == 16 and wide % 16 == 0 and wide > 160, "pixels must be whole"
        time.sleep(0.3)
        browser.press(ARROW_LEFT)
        wait_for_pair(browser, 2)
        browser.press(ARROW_RIGHT)
        wait_for_pair(browser, 3)
        browser.press(" ")
        wait_for_pair(browser, 4)
        browser.press("u")
        wait_for_pair(browser, 3)
        browser.type("#note", "left u right ")  # keys in the field are letters, not answers
        browser.type("#note", ARROW_LEFT + ESCAPE)
        wait_for_pair(browser, 3)
        browser.click("[data-choice=right]")
        wait_for_pair(browser, 4)
        browser.press(" ")  # must not press the button that was clicked
        wait_for_pair(browser, 5)
        browser.click("#undo")
        wait_for_pair(browser, 4)
        browser.press("u")
        wait_for_pair(browser, 3)
        assert browser.run("return document.querySelector('#note').value") == "left u right"
        browser.click("[data-choice=left]")
        wait_for_pair(browser, 4)
        start(browser, page, "eve")  # loaded again: goes on, asks nothing twice
        wait_for_pair(browser, 4)
        start(browser, page, "bob")
        wait_for_pair(browser, 1)
        start(browser, page, "eve")
        for number in range(4, 12):
            wait_for_pair(browser, number)
            assert browser.run(SOURCES) == study.urls(number - 1)
            browser.press(ARROW_LEFT)
        browser.wait_for(
            "return document.querySelector('#progress').innerText.startsWith('All 11 pairs')",
            "the end does not show",
        )
        browser.press(ARROW_LEFT)
        browser.click("#download")
        (file,) = until(lambda: list(downloads.glob("*.json")), "no download")
        assert browser.read_console() == []
    assert file.name == f"answers-{study.id}-eve.json"
    eve = study.import_answers(file)
    choices = [record["choice"] for record in eve.records()]
    assert choices[:9] == [
        *("left", "right", "none", "undo", "right", "none", "undo", "undo", "left"),
    ]
    assert eve.next() is None
    assert [a["choice"] for a in eve.answers()] == ["left", "right", "left", *["left"] * 8]
    assert eve.answers()[2]["note"] == "left u right" and eve.answers()[3]["note"] == ""
    assert 0.3 <= eve.answers()[0]["seconds"] < 120
    assert all(0 <= a["seconds"] < 120 for a in eve.answers())  # a key can come within 5 ms
    assert len(study.analyse()) == 4


def processes(profile: Path) -> list[int]:
    """Return the browser's own processes: those that name this test's profile."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [
        int(line.split()[0]) for line in listed.splitlines() if f"--user-data-dir={profile}" in line
    ]


def test_a_killed_browser_loses_no_answer(study, page, tmp_path):
    profile = tmp_path / "profile"
    with open_browser(f"--user-data-dir={profile}") as browser:
        start(browser, page, "eve")
        for number in (1, 2, 3):
            wait_for_pair(browser, number)
            browser.press(ARROW_RIGHT)
        wait_for_pair(browser, 4)
        for pid in processes(profile):
            os.kill(pid, signal.SIGKILL)
    for lock in profile.glob("Singleton*"):
        lock.unlink()
    with open_browser(f"--user-data-dir={profile}") as browser:
        start(browser, page, "eve")
        wait_for_pair(browser, 4)
        records = browser.run("return records")
    assert [(r["pair"], r["choice"]) for r in records] == [(k, "right") for k in range(3)]


def test_two_windows_of_one_reader_do_not_answer_twice(study, page):
    with open_browser() as browser:
        start(browser, page, "eve")
        wait_for_pair(browser, 1)
        # what another window would do: the same number is taken
        browser.run(
            "save({study: study.study, reader, pair: 0, choice: 'right', seconds: 1, note: '',"
            " time: ''})"
        )
        browser.press(ARROW_LEFT)
        wait_for_pair(browser, 2)
        assert "Another window" in browser.run(
            "return document.querySelector('#problem').innerText"
        )
        assert [r["choice"] for r in browser.run("return records")] == ["right"]


def test_the_page_fits_a_phone_and_names_what_it_shows(page):
    with open_browser() as browser:
        browser.resize(390, 800)
        start(browser, page, "eve")
        wait_for_pair(browser, 1)
        assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [
            390,
            390,
        ]
        assert (
            browser.run("return document.querySelector('#right').getBoundingClientRect().right")
            < 390
        )
        alts = browser.run("return [...document.images].map(i => i.alt)")
        assert alts == ["Left image", "Right image"]
        assert browser.read_console() == []
