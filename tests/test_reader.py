"""The reader study: blinded, crash-proof, and analysed as by hand."""

import json
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from scipy.stats import binom, binomtest

from medbudget import save_images
from medbudget.images import load_image
from medbudget.reader import (
    ReaderError,
    ReaderStudy,
    compute_power,
    compute_preference,
    default_key,
    required_pairs,
)

N = 30


def draw(n, seed, size=(8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("alpha", "beta")):
        names = [f"{name}_patient{i:02d}" for i in range(N)]
        for path in save_images(draw(N, seed), folder / name, names=names):
            secret = PngImagePlugin.PngInfo()
            secret.add_text("Patient", f"{name} secret")
            with Image.open(path) as image:
                image.save(path, pnginfo=secret)
    return folder / "alpha", folder / "beta"


@pytest.fixture
def study(sources, tmp_path):
    return ReaderStudy.create(*sources, tmp_path / "study", seed=4, n_pairs=N)


def read_key(study):
    return json.loads(default_key(study.folder).read_text(encoding="utf-8"))


def answer_all(study, name, choose):
    """Answer with ``choose(item of the key, number)``, which returns a side or "none"."""
    reading = study.reader(name)
    items = read_key(study)["pairs"]
    while (pair := reading.next()) is not None:
        reading.answer(pair, choose(items[pair], pair), seconds=2.0)
    return reading


def side_of(item, source):
    return "left" if item["left"] == source else "right"


def scores_of(study):
    return {score.name: score for score in study.analyse()}


# ---- blinding -----------------------------------------------------------------------------------


def png_chunks(data):
    place, names = 8, set()
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        names.add(data[place + 4 : place + 8])
        place += 12 + length
    return names


def test_nothing_that_a_reader_gets_tells_the_source(study, sources):
    page = study.export(study.folder.parent / "page.html")
    assert not default_key(study.folder).is_relative_to(study.folder)
    texts = [p.read_bytes() for p in study.folder.rglob("*") if p.is_file()] + [page.encode()]
    for text in texts:
        for word in (b"alpha", b"beta", b"patient", b"secret", b"seed", b"repeat_of", b"repeats"):
            assert word not in text.lower()
    for file in (study.folder / "images").iterdir():
        assert png_chunks(file.read_bytes()) == {b"IHDR", b"IDAT", b"IEND"}
    assert not list(study.folder.parent.glob(".*")), "scratch files left behind"


def test_the_key_tells_every_image_and_each_is_used_once(study, sources):
    items = read_key(study)["pairs"]
    assert len(items) == len(study.pairs) == N + N // 10
    for item, (left, right) in zip(items, study.pairs):
        for side, file in (("left", left), ("right", right)):
            folder = sources["ab".index(item[side])]
            assert torch.equal(
                load_image(study.folder / file), load_image(folder / item[item[side]])
            )
    first = [item for item in items if item["repeats"] is None]
    for source in "ab":
        assert len({item[source] for item in first}) == len(first) == N
    assert sum(item["left"] == "a" for item in first) == N // 2


def test_repeats_come_a_third_later_with_their_sides_swapped(study):
    items = read_key(study)["pairs"]
    repeats = [(k, item["repeats"]) for k, item in enumerate(items) if item["repeats"] is not None]
    assert len(repeats) == 3 and len({first for _, first in repeats}) == 3
    for k, first in repeats:
        assert k - first > N // 3 and items[first]["repeats"] is None
        assert study.urls(k) == study.urls(first)[::-1]


def test_the_seed_decides_and_without_one_a_random_one_is_drawn(sources, tmp_path):
    made = [
        ReaderStudy.create(*sources, tmp_path / f"{i}", seed=seed, n_pairs=N)
        for i, seed in enumerate((7, 7, 8, None, None))
    ]
    files = [{p.name: p.read_bytes() for p in s.folder.rglob("*.*")} for s in made]
    assert files[0] == files[1] and made[0].id == made[1].id != made[2].id
    keys = [read_key(s) for s in made]
    assert keys[0] == keys[1] and keys[3]["seed"] != keys[4]["seed"]
    sides = [[item["left"] for item in key["pairs"]] for key in keys]
    assert sides[0] != sides[2] and sides[3] != sides[4]


def test_an_interrupted_call_goes_on_with_its_key(study, sources):
    files = {p.name: p.read_bytes() for p in study.folder.rglob("*.*")}
    shutil.rmtree(study.folder)  # killed between the key and the renaming of the folder
    again = ReaderStudy.create(*sources, study.folder, seed=4, n_pairs=N)
    assert {p.name: p.read_bytes() for p in again.folder.rglob("*.*")} == files


def test_folders_of_different_size_fewer_pairs_and_no_repeats(sources, tmp_path):
    save_images(draw(N - 1, 5), tmp_path / "few")
    folders = (sources[0], tmp_path / "few")
    study = ReaderStudy.create(*folders, tmp_path / "s", seed=1, n_pairs=20, repeats=0)
    items = read_key(study)["pairs"]
    assert len({item["a"] for item in items}) == len({item["b"] for item in items}) == 20
    answer_all(study, "ann", lambda item, k: "left")
    assert not any("twice" in name for name in scores_of(study))


# ---- what is refused ----------------------------------------------------------------------------


def test_folders_that_would_spoil_the_comparison(sources, tmp_path):
    a, b = sources
    few, wide, both = tmp_path / "few", tmp_path / "wide", tmp_path / "both"
    save_images(draw(N - 1, 5), few)
    save_images(draw(N, 6, (8, 10)), wide)
    save_images(torch.cat([draw(N - 1, 7), load_image(sorted(a.iterdir())[3])[None]]), both)
    cases = [
        ((a, few), {"n_pairs": 30}, "few 29, and none is used twice; allowed are 1 to 29"),
        ((a, b), {"n_pairs": 0}, "allowed are 1 to 30"),
        ((a, wide), {}, "different sizes"),
        ((a, both), {}, "alpha_patient03.png and .*00029.png are the same image"),
        ((a, b), {"repeats": 0.5}, "0 to 1/3"),
        ((a, b), {"key": tmp_path / "out" / "key.json"}, "must not lie in"),
        ((a, a), {}, "both folders are called"),
        ((a, tmp_path / "none"), {}, "no such folder"),
    ]
    for folders, options, problem in cases:
        before = sorted(tmp_path.iterdir())
        with pytest.raises((ReaderError, FileNotFoundError), match=problem):
            ReaderStudy.create(*folders, tmp_path / "out", seed=1, **{"n_pairs": 10, **options})
        assert sorted(tmp_path.iterdir()) == before, "something half-written"


def test_nothing_is_overwritten(study, sources):
    with pytest.raises(FileExistsError, match="study exists"):
        ReaderStudy.create(*sources, study.folder, seed=1, n_pairs=3)
    out = study.folder.with_name("other")
    with pytest.raises(FileExistsError, match=r"key\.json exists"):
        ReaderStudy.create(*sources, out, seed=1, n_pairs=3, key=default_key(study.folder))
    assert not out.exists()


def test_broken_studies_keys_and_names(study, sources, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"study\.json"):
        ReaderStudy.load(tmp_path)
    for name in ("Ann", "a b", "../x", "", "-x", "x" * 41):
        with pytest.raises(ReaderError, match="lower-case"):
            study.reader(name)
    with pytest.raises(ReaderError, match="no answers yet"):
        study.analyse()
    study.reader("ann").answer(0, "left", seconds=1)
    score = study.analyse()[0]
    assert score.n == 1 and f"1 of {len(study.pairs)} pairs answered" in score.note
    other = ReaderStudy.create(*sources, tmp_path / "other", seed=5, n_pairs=N)
    with pytest.raises(ReaderError, match=f"key of study {other.id}, not of {study.id}"):
        study.analyse(default_key(other.folder))
    (study.folder / study.pairs[0][0]).unlink()
    with pytest.raises(ReaderError, match="has no image"):
        ReaderStudy.load(study.folder)


# ---- answers ------------------------------------------------------------------------------------


def test_answers_are_only_added(study):
    ann, bob = study.reader("ann"), study.reader("bob")
    ann.answer(0, "left", seconds=1.234, note="odd “edge”\u2028line")
    before = ann.path.read_bytes()
    ann.answer(1, "none", seconds=3)
    assert ann.path.read_bytes().startswith(before) and ann.next() == 2
    assert [a["choice"] for a in ann.answers()] == ["left", "none"]
    first = ann.records()[0]
    assert first["note"] == "odd “edge”\u2028line" and first["seconds"] == 1.23
    assert bob.next() == 0 and study.readers() == ["ann"]
    bob.answer(0, "left", seconds=1)
    assert study.readers() == ["ann", "bob"] and bob.path != ann.path
    for pair, choice, problem in ((1, "left", "not the next"), (2, "maybe", "left, right, none")):
        with pytest.raises(ReaderError, match=problem):
            ann.answer(pair, choice, seconds=1)


def test_an_edited_file_is_refused(study):
    ann = study.reader("ann")
    for pair in range(3):
        ann.answer(pair, "left", seconds=1)
    lines = ann.path.read_bytes().splitlines(keepends=True)
    for text, problem in (
        ([b"oops\n", *lines], "is not JSON"),
        ([lines[0], lines[2]], "does not follow"),
        ([lines[0], lines[0]], "does not follow"),
        ([lines[0].replace(b'"left"', b'"middle"')], "does not follow"),
        ([lines[0].replace(b'"ann"', b'"bob"')], "does not follow"),
        ([lines[0].replace(study.id.encode(), b"0123456789ab")], "answers study 0123456789ab"),
        ([b"[1]\n"], "is no answer"),
    ):
        ann.path.write_bytes(b"".join(text))
        with pytest.raises(ReaderError, match=problem):
            ann.answer(1, "left", seconds=1)
        assert ann.path.read_bytes() == b"".join(text)


READ = """
import sys
from pathlib import Path
from medbudget.reader import Reading
reading = Reading(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "ann")
while (pair := reading.next()) is not None:
    reading.answer(pair, "left", seconds=1)
    print(pair, flush=True)
"""


def test_a_killed_reading_loses_nothing_and_asks_nothing_twice(study):
    confirmed = []
    command = [sys.executable, "-c", READ, study.folder, study.id, str(len(study.pairs))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        confirmed.append(int(line))
        if len(confirmed) == 7:
            break
    process.send_signal(signal.SIGKILL)
    confirmed += [int(line) for line in process.stdout]
    process.wait()
    answers = study.reader("ann").answers()
    # killed between disk and print, one answer more may be written than was printed
    assert confirmed == list(range(len(confirmed))) and len(answers) - len(confirmed) in (0, 1)
    assert [a["pair"] for a in answers] == list(range(len(answers)))
    answer_all(study, "ann", lambda item, k: "right")
    assert [r["pair"] for r in study.reader("ann").records()] == list(range(len(study.pairs)))


# ---- the page's answers -------------------------------------------------------------------------


def page_records(study, name, choices):
    who = {"study": study.id, "reader": name, "seconds": 1.5, "note": "", "time": "2026-01-01"}
    return [{**who, "pair": k, "choice": choice} for k, choice in enumerate(choices)]


def test_a_pages_answers_are_imported_once_and_continued(study, tmp_path):
    file = tmp_path / "answers.json"
    records = page_records(study, "eve", ["left", "right", "none"])
    file.write_text(json.dumps(records[:2]), encoding="utf-8")
    assert study.import_answers(file).next() == 2
    assert study.import_answers(file).next() == 2
    undo = {**records[2], "choice": "undo"}
    file.write_text(json.dumps([*records, undo]), encoding="utf-8")
    eve = study.import_answers(file)
    assert eve.next() == 2 and eve.records() == [*records, undo]
    file.write_text(json.dumps(records[:1]), encoding="utf-8")
    assert study.import_answers(file).records() == [*records, undo], "an older file is no news"


def test_imports_that_do_not_fit(study, tmp_path):
    study.reader("ann").answer(0, "left", seconds=9)
    file = tmp_path / "answers.json"
    ann = page_records(study, "ann", ["right"])
    before = {p: p.read_bytes() for p in study.folder.rglob("*.jsonl")}
    for records, problem in (
        (ann, "two readers"),
        ([], "holds no answers"),
        ({"a": 1}, "holds no answers"),
        ([1], "holds no answers"),
        ([{**ann[0], "study": "x"}], "answers study x"),
        ([{**ann[0], "reader": "../ann"}], "lower-case"),
        ([{**ann[0], "seconds": "soon"}], "is no answer"),
        (page_records(study, "bob", ["left"] * (len(study.pairs) + 1)), "does not follow"),
    ):
        file.write_text(json.dumps(records), encoding="utf-8")
        with pytest.raises(ReaderError, match=problem):
            study.import_answers(file)
    file.write_text("no", encoding="utf-8")
    with pytest.raises(ReaderError, match="is not JSON"):
        study.import_answers(file)
    assert {p: p.read_bytes() for p in study.folder.rglob("*.jsonl")} == before


def test_the_page_asks_for_nothing_and_runs_no_image_or_question(sources, tmp_path):
    question = "Which? </script><script>alert(1)</script> $STUDY & more"
    study = ReaderStudy.create(
        *sources, tmp_path / "s", seed=1, n_pairs=2, repeats=0, question=question
    )
    page = study.export()
    assert page.count("<script") == 2 and "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    data = page.split('id="study">')[1].split("</script>")[0]
    assert json.loads(data) == {
        "study": study.id,
        "question": question,
        "pairs": [study.urls(0), study.urls(1)],
    }


# ---- analysis -----------------------------------------------------------------------------------


def test_preferences_are_tested_against_one_half():
    assert compute_preference(36, 50).p_value == compute_preference(14, 50).p_value
    assert compute_preference(5, 5).p_value == pytest.approx(2 / 32)  # by hand
    for chosen, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            compute_preference(chosen, n)


@pytest.mark.parametrize(("n", "preference"), [(5, 0.9), (50, 0.72), (51, 0.3)])
def test_power_is_the_chance_of_a_small_p(n, preference):
    want = sum(
        binom.pmf(k, n, preference) for k in range(n + 1) if binomtest(k, n, 0.5).pvalue <= 0.05
    )
    assert compute_power(n, preference) == pytest.approx(want, abs=1e-12)


def test_number_of_pairs_for_a_preference():
    n = required_pairs(0.72)
    power = compute_power(np.arange(n - 1, n + 200), 0.72)
    assert power[0] < 0.8 <= power[1:].min()
    # the normal approximation: ((1.96 * 0.5 + 0.8416 * sqrt(0.72 * 0.28)) / 0.22) ** 2 = 38.1
    assert 38 <= n <= 46
    assert required_pairs(0.28) == n < required_pairs(0.6)
    with pytest.raises(ValueError, match="takes over"):
        required_pairs(0.5)


def test_readers_who_always_take_one_source_or_one_side(study):
    answer_all(study, "ann", lambda item, k: side_of(item, "a"))
    answer_all(study, "bob", lambda item, k: "left")
    scores = scores_of(study)
    first = scores["preference for alpha, ann"]
    assert (first.value, first.n) == (1, N) and "p = 1.9e-09" in first.note
    assert 0.4 < scores["choice of the left side, ann"].value < 0.6
    assert scores["same answer twice, ann"].value == 1
    assert scores["seconds an answer, ann"].value == 2
    assert scores["preference for alpha, bob"].value == 0.5
    sides = scores["choice of the left side, bob"]
    assert (sides.value, sides.n) == (1, len(study.pairs))
    assert scores["same answer twice, bob"].value == 0


def test_no_preference_is_left_out_and_counted(study):
    answer_all(study, "ann", lambda item, k: "none" if k % 3 == 0 else side_of(item, "b"))
    items = read_key(study)["pairs"]
    ties = sum(k % 3 == 0 for k, item in enumerate(items) if item["repeats"] is None)
    score = scores_of(study)["preference for alpha, ann"]
    assert (score.value, score.n) == (0, N - ties)
    assert f"{ties} of {N} without a preference left out" in score.note
    answer_all(study, "bob", lambda item, k: "none")
    score = scores_of(study)["preference for alpha, bob"]
    assert np.isnan(score.value) and score.n == 0 and "p =" not in score.note


def test_several_readers_by_hand(sources, tmp_path):
    study = ReaderStudy.create(*sources, tmp_path / "s", seed=3, n_pairs=4, repeats=0)
    votes = {"ann": "aabb", "bob": "abbb"}
    for name, sourced in votes.items():
        answer_all(study, name, lambda item, k, sourced=sourced: side_of(item, sourced[k]))
    scores = scores_of(study)
    most = scores["preference for alpha, majority"]
    # pair 0: both a; pair 1: one each, left out; pairs 2 and 3: both b
    assert most.value == pytest.approx(1 / 3) and most.n == 3 and "1 of 4 without" in most.note
    # observed disagreement 2 / 8, expected 2 * 3 * 5 / (8 * 7): alpha = 1 - 0.25 / 0.5357
    assert scores["Krippendorff's alpha"].value == pytest.approx(0.5333, abs=1e-4)
    assert scores["Krippendorff's alpha"].n == 4
    study = ReaderStudy.create(*sources, tmp_path / "t", seed=3, n_pairs=4, repeats=0)
    for name in ("cid", "dan"):
        answer_all(study, name, lambda item, k: side_of(item, "a"))
    same = scores_of(study)
    assert np.isnan(same["Krippendorff's alpha"].value)
    assert same["preference for alpha, majority"].value == 1


def test_command_line_from_folders_to_scores(medbudget, sources, tmp_path):
    out, page, file = tmp_path / "study", tmp_path / "page.html", tmp_path / "answers.json"
    code, said, _ = medbudget("reader-study", "create", *sources, "--out", out, "--seed", 3,
                              "--n-pairs", 20, "--key", tmp_path / "k.json")  # fmt: skip
    assert code == 0 and "22 questions on 20 pairs" in said
    assert f"80%: {binom.sf(14, 20, 0.8) + binom.cdf(5, 20, 0.8):.0%}" in said  # 15 of 20: p = .041
    assert medbudget("reader-study", "export", out, "--out", page)[0] == 0
    study = ReaderStudy.load(out)
    assert page.read_text(encoding="utf-8") == study.export()
    file.write_text("mine", encoding="utf-8")
    code, _, err = medbudget("reader-study", "export", out, "--out", file)
    assert code == 1 and "is there already" in err and file.read_text() == "mine"
    file.write_text(json.dumps(page_records(study, "eve", ["left"] * 22)), encoding="utf-8")
    code, said, err = medbudget("reader-study", "analyse", out, "--answers", file)
    assert code == 1 and "study.key.json" in err
    code, said, _ = medbudget("reader-study", "analyse", out, "--answers", file, "--key",
                              tmp_path / "k.json", "--out", tmp_path / "s.json")  # fmt: skip
    assert code == 0 and "eve: 22 answers" in said and "preference for alpha, eve" in said
    assert "next study, as found: to show a preference of 50.0%" in said
    names = [s["name"] for s in json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))]
    assert names[0] == "preference for alpha, eve"
