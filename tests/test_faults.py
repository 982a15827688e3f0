"""Nothing is lost: kills, full disks, signals, broken checkpoints, two processes on one output."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medbudget import InversionSettings, invert, load_images, make_phantoms, save_images
from medbudget.files import InUseError, atomic_path, hold, lock_file, write_text
from medbudget.runs import Steps, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import faults  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no POSIX signals here"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory, forkserver):
    """The folder of `faults.try_kills`, with what its commands work on."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        folder = tmp_path_factory.mktemp("faults")
        faults.make_given(folder / "given")
        yield folder


def wait_for(condition, process=None, seconds=240):
    limit = time.monotonic() + seconds
    while not condition():
        assert process is None or process.exitcode is None, "it ended too early"
        assert time.monotonic() < limit
        time.sleep(0.01)


# --------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("name", sorted({*faults.COMMANDS} - {"study"}))  # below, with its workers
def test_a_killed_command_ends_as_an_undisturbed_one(work, name):
    kills = 2 if name == "prepare" else 1  # the second at a file operation
    rows = faults.try_kills(name, work, kills=kills)
    assert not [p for row in rows for p in row["problems"]]
    assert sum(row["survived"] for row in rows) == kills


def test_the_benchmark_sees_what_is_left_differs_or_is_repeated(tmp_path):
    (tmp_path / "a" / "scratch").mkdir(parents=True)
    (tmp_path / "a" / "x.json").write_text('{"value": 1, "seconds": 5}')
    results = faults.read_results(tmp_path / "a")
    (tmp_path / "a" / "x.json").write_text('{"value": 1, "seconds": 6}')
    assert faults.read_results(tmp_path / "a") == results
    command = faults.COMMANDS["invert"]
    assert faults._compare(command, tmp_path / "a", results, 0) == ""
    (tmp_path / "a" / "scratch" / "y").touch()
    assert "left behind: scratch/y" in faults._compare(command, tmp_path / "a", results, 0)
    (tmp_path / "a" / "scratch" / "y").unlink()
    (tmp_path / "a.side").mkdir()
    for i, text in enumerate(("0 1 2 3 4 5 6 7", "1 2 3 4 5 6 7 8")):
        (tmp_path / "a.side" / f"units{i}.txt").write_text("\n".join(text.split()))
    assert "7 units repeated, 5" in faults._compare(command, tmp_path / "a", results, 1)
    (tmp_path / "a" / "x.json").write_text('{"value": 2}')
    assert "differ" in faults._compare(command, tmp_path / "a", results, 0)


# --------------------------------------------------------------------------------- signals


def test_a_signal_stops_between_two_steps_with_a_checkpoint(work, tmp_path):
    """SIGINT goes the same way: to a study's workers, and in a notebook, below."""
    log, side = tmp_path / "log", tmp_path / "side"
    process = faults.start("invert", work / "given", tmp_path / "out", side, log=log)
    wait_for(lambda: log.exists() and len(log.read_text().split()) >= 8, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    done = len(log.read_text().split())
    assert process.exitcode == 143 and 8 <= done < 30
    said = (side / "said.txt").read_text().splitlines()
    assert said[-1:] == [
        f"stopped at step {done} of 30; run the same again to go on from "
        f"{tmp_path / 'out' / 'x.ckpt'}",
    ]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.ckpt"]
    again = faults.start("invert", work / "given", tmp_path / "out", side, log=tmp_path / "log2")
    again.join(120)
    assert again.exitcode == 0
    steps = [int(json.loads(x).strip("'")) for x in (tmp_path / "log2").read_text().splitlines()]
    assert steps == list(range(done, 30)), "no step is lost or repeated"
    whole = work / "invert" / "whole"
    if not (whole / "x.safetensors").exists():
        faults.start("invert", work / "given", whole, side).join(120)
    assert faults.read_results(tmp_path / "out") == faults.read_results(whole)


FOURS = {"CFG scale": (1, 2), "vectors": (4, 64)}
STUDY = [
    *("n=32", "cases=8", "steps=1", "extractors=layout"),
    *("overrides.steps=2", "overrides.batch_size=1"),
    *("grid.CFG scale=[1, 2]", "grid.vectors=[4, 64]", "grid.cases=[]", "grid.sampling steps=[]"),
]


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if int(parent) == pid and state != "Z" and "spawn_main" in command:
            found.append(int(name.split()[0]))
    return found


def _study(store, said):
    os.setsid()  # Ctrl-C goes to a command and its workers
    os.environ["TQDM_DISABLE"] = "1"
    for file, stream in ((os.devnull, 1), (said, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    settings = (word for setting in STUDY for word in ("--set", setting))
    faults.medbudget("study", "table1", "--store", store, "--workers", "2", *settings)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_of_a_study_are_orphaned_and_are_interrupted(tiny, tmp_path, forkserver):
    from test_studies import small

    from medbudget.studies import Store, run

    store = tmp_path / "store"

    def disturb(how, kind, n):
        said = tmp_path / f"said_{kind}.txt"
        process = forkserver.Process(target=_study, args=(store, said))
        process.start()
        wait_for(lambda: len(list((store / kind).glob("[0-9a-f]*.safetensors"))) >= n, process)
        workers = children(process.pid)
        assert len(workers) == 2
        how(process)
        process.join(120)
        wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))
        error = said.read_text()
        assert "Traceback" not in error
        noise = ("resource_tracker", "warnings.warn")  # of Python, which counts its semaphores
        return process.exitcode, [
            line for line in error.splitlines() if not any(word in line for word in noise)
        ]

    code, _ = disturb(lambda process: process.kill(), "images", 1)
    assert code == -signal.SIGKILL
    code, said = disturb(lambda process: os.killpg(process.pid, signal.SIGINT), "block", 3)
    assert code == 130 and said == ["stopped: the same command goes on from here"]
    study = small(tiny.hash, n=32, steps=1, grid=FOURS)
    assert run(study.tasks, Store(store)) > 0
    assert faults.find_leftovers(store) == []


CELL = """
import sys
from medbudget import InversionSettings, invert, load_base, load_images
settings = InversionSettings(n_vectors=4, steps=40, lr=0.01, batch_size=2, checkpoint_every=1000)
e = invert(load_base("tiny", device="cpu"), load_images({images!r}), token="<x>",
           settings=settings, checkpoint={path!r}, callback=lambda s: open({log!r}, "a").write("."))
"""


def test_the_stop_button_of_a_notebook_keeps_the_run(tmp_path):
    manager = pytest.importorskip("jupyter_client.manager")
    images, path, log = (str(tmp_path / name) for name in ("images", "x.ckpt", "log"))
    save_images(make_phantoms("prostate", "healthy", 4).images, images)
    cell = CELL.format(images=images, path=path, log=log)
    kernel, client = manager.start_new_kernel(
        extra_arguments=["--HistoryManager.hist_file=:memory:"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        # stop_on_error: after an error, ipykernel refuses for a moment what comes next ("aborted")
        asked = client.execute(cell, stop_on_error=False)
        wait_for(lambda: Path(log).exists() and os.path.getsize(log) >= 3)
        kernel.interrupt_kernel()
        message = client.get_shell_msg(timeout=120)
        while message["parent_header"]["msg_id"] != asked:
            message = client.get_shell_msg(timeout=120)
        reply = message["content"]
        assert reply["status"] == "error" and reply["ename"] == "Stopped"
        assert "run the same again to go on" in reply["evalue"]
        done = os.path.getsize(log)
        assert 3 <= done < 40 and Path(path).exists()
        reply = client.execute(cell, reply=True, timeout=240)["content"]
        assert reply["status"] == "ok" and os.path.getsize(log) == 40, "goes on after the step"
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


# ----------------------------------------------------------------------------- checkpoints


def test_a_loss_that_is_not_finite_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    from medbudget.cases import Cases
    from medbudget.classifier import ClassifierSettings, train_classifier

    images = make_phantoms("prostate", "healthy", 12, size=32).images
    train, val = (Cases.of(part[:3], 255 - part[3:]) for part in (images[:6], images[6:]))
    settings = ClassifierSettings.preset(
        "tiny", size=32, steps=9, batch_size=2, validate_every=3, frozen=8, checkpoint_every=1
    )
    whole = train_classifier(train, val, settings)
    entropy, calls = torch.nn.functional.cross_entropy, []

    def broken(*args):
        calls.append(1)
        return entropy(*args) * (float("nan") if len(calls) == 5 else 1)

    path = tmp_path / "x.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.cross_entropy", broken)
        with pytest.raises(RuntimeError, match=r"became nan before step 5.*is untouched"):
            train_classifier(train, val, settings, checkpoint=path)
    resumed = train_classifier(train, val, settings, checkpoint=path)
    assert resumed.record["history"] == whole.record["history"]


# ----------------------------------------------------------- two processes on the same output


def _hold(path, ready, fork):
    with hold(path):
        if fork and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        Path(ready).touch()
        time.sleep(600)


@pytest.fixture
def holder(forkserver, tmp_path):
    """Start a process that holds an output; all of them are killed at the end."""
    started = []

    def start(path, fork=False):
        ready = tmp_path / f"ready{len(started)}"
        process = forkserver.Process(target=_hold, args=(path, ready, fork))
        process.start()
        started.append(process)
        wait_for(ready.exists, process)
        return process

    yield start
    for process in started:
        process.kill()


def test_an_output_in_use_is_refused_by_name_until_its_process_is_gone(
    holder, work, tmp_path, medbudget, monkeypatch
):
    given, out, ti = work / "given", tmp_path / "out", tmp_path / "x.safetensors"
    few = ("--steps", 1, "--batch-size", 1, "--n-vectors", 2, "--samples", 0)
    splits = tuple(given / "splits" / name for name in ("train", "val", "test"))
    commands = {
        ti: ("invert", given / "a", "--token", "<x>", "--out", ti, *few),
        out / "s": ("sample", "red", "--n", 1, "--steps", 1, "--out", out / "s"),
        out / "i": ("inpaint", given / "a" / "00000.png", "red", "--ellipse", ".5,.5,.2,.2",
                    "--steps", 1, "--out", out / "i"),
        out / "c": ("classify", *splits, "--runs", 1, "--steps", 1, "--out", out / "c"),
        out / "p": ("prepare", "folder", given / "classes", "--size", 32, "--workers", 1,
                    "--out", out / "p"),
    }  # fmt: skip
    for path, command in commands.items():
        if path != ti:
            path.mkdir(parents=True)
        process = holder(path)
        code, _, error = medbudget(*command)
        assert code == 1 and len(error.strip().splitlines()) == 1, error
        assert "is being written by another process" in error and "another place" in error
        assert lock_file(path).exists(), "the refused one must not remove it"
        process.kill()
        process.join()
        assert lock_file(path).exists(), "what a killed one leaves"
        assert medbudget(*command)[0] == 0, command
        assert not lock_file(path).exists()


def test_a_checkpoint_in_use_is_refused_and_a_lock_is_not_inherited(holder, tiny, tmp_path):
    path = tmp_path / "x.ckpt"
    process = holder(path, fork=True)
    images = make_phantoms("prostate", "healthy", 2).images
    few = InversionSettings(n_vectors=4, steps=1, batch_size=2)
    with pytest.raises(InUseError, match="another process"):
        invert(tiny, images, token="<x>", settings=few, checkpoint=path)
    os.utime(lock_file(path), (0, 0))  # however old it seems
    with pytest.raises(InUseError), hold(path):
        pass
    process.kill()
    process.join()  # its fork lives on
    assert invert(tiny, images, token="<x>", settings=few, checkpoint=path).step == 1


def test_two_writers_of_one_file_leave_it_whole(tmp_path):
    path = tmp_path / "x.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("first")
        write_text(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_whoever_holds_an_output_removes_what_a_killed_process_left(tmp_path):
    (tmp_path / ".x.txt.0123abcd.tmp").write_text("half")
    (tmp_path / ".y.txt.0123abcd.tmp").write_text("half")
    (tmp_path / ".mine.tmp").write_text("kept")
    with hold(tmp_path / "x.txt"):
        assert not (tmp_path / ".x.txt.0123abcd.tmp").exists()
        assert (tmp_path / ".y.txt.0123abcd.tmp").exists()  # another file's writer may live
    with hold(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".mine.tmp"]


# ------------------------------------------------------------------------ disks and folders


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 96 kB that can be enlarged, or made read-only, by its options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", place]
        return subprocess.run(command, capture_output=True).returncode == 0

    if shutil.which("mount") is None or not mount("size=96k"):
        pytest.skip("mounting a small disk needs root")
    yield place, lambda *options: mount("remount", *options)
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_one_error_and_leaves_whole_files(small_disk, medbudget, tmp_path):
    disk, remount = small_disk
    command = ("sample", "red ground", "--n", 18, "--steps", 1, "--out")
    code, _, error = medbudget(*command, disk / "made")
    assert code == 1 and len(error.strip().splitlines()) == 1
    assert "No space left on device" in error and ".png" in error and "as it was" in error
    assert faults.find_leftovers(disk) == []
    there = sorted((disk / "made").iterdir())
    assert 1 <= len(there) < 18 and len(load_images(disk / "made")) == len(there)
    assert remount("size=10m")
    for folder in (disk / "made", tmp_path / "whole"):
        assert medbudget(*command, folder)[0] == 0
    assert faults.read_results(disk / "made") == faults.read_results(tmp_path / "whole")


def test_a_full_disk_keeps_the_checkpoint_that_was_there(small_disk):
    disk, _ = small_disk

    class Growing:
        step, size = 0, 10

        def state_dict(self):
            return {"step": self.step, "values": torch.zeros(self.size)}

    run = Growing()
    with pytest.raises(OSError, match=r"cannot write .*x\.ckpt: No space left.*as it was"):
        for _ in Steps(run, 2, checkpoint=disk / "x.ckpt", every=1):
            run.step += 1
            run.size = 10 if run.step == 1 else 100_000
    assert load_checkpoint(disk / "x.ckpt")["step"] == 1
    assert [p.name for p in disk.iterdir()] == ["x.ckpt"]


def test_a_file_that_may_not_grow_is_a_full_disk_too(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write_text(tmp_path / "x.txt", "old")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(OSError, match=r"cannot write .*x\.txt: File too large"):
            write_text(tmp_path / "x.txt", "new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "x.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_read_only_folder_is_refused_before_the_work(small_disk, work, medbudget, monkeypatch):
    disk, remount = small_disk
    (disk / "made").mkdir()
    assert remount("ro")
    monkeypatch.setattr("medbudget.loading.load_base", None)  # refused before that
    given = work / "given"
    for command in (
        ("invert", given / "a", "--token", "<x>", "--out", disk / "x.safetensors"),
        ("sample", "red", "--out", disk / "made"),
        ("inpaint", given / "a", "red", "--ellipse", ".5,.5,.2,.2", "--out", disk / "made"),
        ("evaluate", given / "a", given / "b", "--out", disk / "scores.json"),
        ("prepare", "folder", given / "classes", "--out", disk / "set"),
        ("phantoms", disk / "made", "--n", 1),
        ("reader-study", "create", given / "a", given / "b", "--out", disk / "s", "--seed", 1,
         "--n-pairs", 3),
    ):  # fmt: skip
        code, _, error = medbudget(*command)
        assert code == 1 and len(error.strip().splitlines()) == 1, (command[0], error)
        assert "Read-only file system" in error and str(disk) in error, (command[0], error)


def test_missing_folders_are_made_for_output_and_named_for_input(work, medbudget, tmp_path):
    few = ("--steps", 1, "--batch-size", 1, "--n-vectors", 2, "--samples", 0)
    out = tmp_path / "new" / "deep" / "x.safetensors"
    given = work / "given" / "a"
    assert medbudget("invert", given, "--token", "<x>", "--out", out, *few)[0] == 0 and out.exists()
    missing = tmp_path / "missing"
    for command in (
        ("invert", missing, "--token", "<x>", "--out", tmp_path / "y.safetensors", *few),
        ("inpaint", missing, "red", "--ellipse", ".5,.5,.2,.2", "--out", tmp_path / "y"),
        ("evaluate", missing, given),
        ("classify", missing, missing, missing, "--out", tmp_path / "y"),
        ("prepare", "folder", missing, "--out", tmp_path / "y"),
    ):
        code, _, error = medbudget(*command)
        assert code == 1 and str(missing) in error and len(error.strip().splitlines()) == 1
    assert not [p for p in tmp_path.rglob("y*") if p.is_file()]


def test_out_of_memory_is_one_line_and_leaves_nothing(medbudget, tmp_path, monkeypatch):
    monkeypatch.setattr("medbudget.outputs.draw_images", lambda *_: bytearray(2**62))
    code, _, error = medbudget("sample", "red", "--n", 1, "--steps", 1, "--out", tmp_path / "made")
    assert code == 1 and error.startswith("error: out of memory")
    assert len(error.strip().splitlines()) == 1 and list((tmp_path / "made").iterdir()) == []
