"""A reader study's exported page, read in a real browser from file://, and brought back."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from webdriver import ARROW_LEFT, ARROW_RIGHT, ESCAPE, needs_browser, open_browser, until

from medbudget import save_images
from medbudget.reader import ReaderError, ReaderStudy, compute_preference, default_key

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
        assert shown == 16 and 160 < wide <= 448, "large enough to judge, no larger"
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


RESULT = "return document.querySelector('#result').innerText"
FRAME = """
document.documentElement.dataset.theme = 'light';
const frame = document.body.appendChild(document.createElement('iframe'));
frame.style = 'width: 700px; height: 560px';
frame.srcdoc = arguments[0];
"""
INSIDE = "const {document: inner} = document.querySelector('iframe').contentWindow; return "


def test_a_page_with_the_key_ends_with_the_result_beside_the_papers(study, tmp_path):
    key = default_key(study.folder)
    reference = (torch.full((3, 16, 16), 99, dtype=torch.uint8), "A gray square.")
    study.export(tmp_path / "page.html", reveal=key, reference=reference)
    items = json.loads(key.read_text(encoding="utf-8"))["pairs"]
    with open_browser() as browser:
        browser.open((tmp_path / "page.html").as_uri())
        assert browser.run("return document.querySelector('#reference img').alt") == reference[1]
        browser.click("#start button")
        for number, item in enumerate(items, 1):
            wait_for_pair(browser, number)
            if item["repeats"] is not None:
                choice = ARROW_LEFT  # not counted
            else:  # a is chosen in all pairs but three, of which one has no preference
                a = item["left"] == "a"
                wanted = " " if number == 1 else "b" if number < 4 else "a"
                choice = (
                    wanted if wanted == " " else ARROW_LEFT if a == (wanted == "a") else ARROW_RIGHT
                )
            browser.press(choice)
        browser.wait_for(f"{RESULT} !== ''", "no result shows")
        result = browser.run(RESULT)
        ours, paper = compute_preference(7, 9), compute_preference(36, 50)
        for found, text in ((ours, "You chose a over b"), (paper, "The paper’s radiologist chose")):
            low, high = (round(100 * limit) for limit in found.interval)
            p = f"{found.p_value:.{3 if found.p_value < 0.1 else 2}f}".removeprefix("0")
            assert text in result and (
                f"in {found.chosen} of {found.n} pairs: {round(100 * found.share)} % "
                f"(95 % interval {low} to {high} %, p = {p})" in result
            )
        assert "9 pairs cannot tell your choice from chance" in result
        alts = browser.run("return [...document.querySelectorAll('#result img')].map(i => i.alt)")
        assert alts[:2] == [reference[1], f"Pair 1, left: {items[0]['left']}"]
        assert len(alts) == 1 + 2 * len(items)
        browser.click("#again")
        wait_for_pair(browser, 1)
        assert browser.run(RESULT) == "" and browser.read_console() == []
    with pytest.raises(ReaderError, match="is the key of study"):
        text = key.read_text(encoding="utf-8").replace(study.id, "0" * 12)
        (tmp_path / "other.json").write_text(text, encoding="utf-8")
        study.export(reveal=tmp_path / "other.json")
    assert '"reveal"' not in study.export()


def test_a_frame_takes_the_pages_colours_and_no_more_room_than_it_needs(study, tmp_path):
    (tmp_path / "outer.html").write_text("<!doctype html><html lang='en'><body></body></html>")
    with open_browser() as browser:
        browser.open((tmp_path / "outer.html").as_uri())
        browser.run(FRAME.replace("arguments[0]", json.dumps(study.export())))
        browser.wait_for(
            f"{INSIDE} inner.documentElement.dataset.theme === 'light'", "the frame stays dark"
        )
        browser.wait_for(
            f"{INSIDE} Math.abs(document.querySelector('iframe').offsetHeight"
            " - inner.body.offsetHeight) <= 12",
            "the frame is higher or lower than its content",
        )
        browser.run("document.documentElement.dataset.theme = 'dark'")
        browser.wait_for(
            f"{INSIDE} getComputedStyle(inner.body).backgroundColor === 'rgb(27, 27, 27)'",
            "the frame stays light",
        )


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
