"""The determinism matrix: which promise is tested where.

=============================================  ================================================
promise                                        test
=============================================  ================================================
a word: two runs, equal bytes                  here
a word: stopped, resumed                       test_inversion (interrupted)
a word: killed, resumed                        test_faults (killed_command)
images: drawn twice, equal bytes               here
images: block by block, equal bytes            here
sample: stopped and started again              test_cli (goes_on_where_it_was)
preparation: one process or two                test_prepare (two_workers)
preparation: killed and resumed                test_prepare (killed_and_resumed)
study: one process, two, or shares             test_studies (workers, two_shares)
study: on Ray, with a node lost                test_studies (ray_loses_a_node)
study: any number of threads, equal bytes      test_studies (threads_of_the_process)
images: other batch sizes, 1 gray level        here
images: other thread counts, 1 gray level      here
bfloat16 against float32                       here, tolerance as recorded
a GPU against the CPU                          here (mark gpu; not run where this was written)
another make of CPU                            not tested: no second machine
=============================================  ================================================
"""

import re
from pathlib import Path

import pytest
import torch

from medbudget import (
    Embedding,
    InversionSettings,
    ellipse,
    inpaint,
    invert,
    load_base,
    make_phantoms,
    sample,
)
from medbudget.results import load_result

WORD = Embedding(torch.randn(4, 96, generator=torch.Generator().manual_seed(0)), "<x>")
DRAW = {"embeddings": [WORD], "steps": 6, "seed": 5}


def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.int() - b.int()).abs().float()


@pytest.fixture(scope="module")
def whole(tiny):
    return sample(tiny, "<x>", n=8, **DRAW)


def test_every_test_of_the_table_exists():
    for module, names in re.findall(r"(test_\w+) \(([\w, ]+)\)", __doc__):
        text = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        for name in names.split(", "):
            assert re.search(rf"def test_\w*{name}", text), (module, name)


def test_a_word_trained_twice_has_equal_bytes(tiny):
    images = make_phantoms("prostate", "tumour", 4).images
    settings = InversionSettings(n_vectors=2, steps=3, lr=0.01, batch_size=2)
    a, b = (invert(tiny, images, token="<x>", settings=settings).vectors for _ in range(2))
    assert a.equal(b)
    other = InversionSettings(n_vectors=2, steps=3, lr=0.01, batch_size=2, seed=1)
    assert not a.equal(invert(tiny, images, token="<x>", settings=other).vectors)


def test_words_and_images_are_those_of_earlier_versions(tiny):
    """Recorded with this decoder and these phantoms; sums are ordered anew on other processors."""
    vectors = 0.3 * torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    words = [Embedding(vectors, "<mine>"), Embedding(1 - 3 * vectors, "<other>")]
    both = sample(
        tiny, "<mine>:0.5 AND <other>:0.5", embeddings=words, n=2, steps=4, cfg_scale=3, seed=2
    )
    healthy = make_phantoms("prostate", "healthy", 1).images
    mask, paint = ellipse((0.5, 0.55), (0.2, 0.15)), {"content": "noise", "strength": 0.9}
    painted = inpaint(
        tiny, healthy, mask, "<mine>", embeddings=words[0], steps=4, n=2, seed=3, **paint
    )
    for images, means in (
        (both, [137.319, 115.495, 111.713, 139.134, 103.564, 100.895]),
        (painted, [87.035, 81.869, 43.736, 85.146, 83.178, 45.613]),
    ):
        found = images.float().mean((2, 3)).flatten().tolist()
        assert found == pytest.approx(means, abs=0.05)
    tumours = make_phantoms("prostate", "tumour", 6).images
    for loss, curve in (
        ("plain", [0.03927, 0.14097, 0.01133, 0.08017, 0.09768, 0.10049]),
        ("min_snr", [0.02386, 0.03324, 0.02882, 0.03163, 0.03166, 0.02322]),
    ):
        settings = InversionSettings.preset(
            "paper", n_vectors=4, steps=6, lr=0.01, batch_size=2, loss=loss
        )
        history = invert(tiny, tumours, token="<x>", settings=settings).history
        assert history["loss"] == pytest.approx(curve, rel=1e-3, abs=1e-5)


def test_blocks_of_one_size_have_equal_bytes_however_they_are_called(tiny, whole):
    assert whole.equal(sample(tiny, "<x>", n=8, **DRAW))
    together = sample(tiny, "<x>", n=8, batch_size=4, **DRAW)
    seeds = (DRAW["seed"], DRAW["seed"] + 4)
    parts = [sample(tiny, "<x>", n=4, **{**DRAW, "seed": seed}) for seed in seeds]
    assert together.equal(torch.cat(parts))
    assert apart(together, whole).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 5])
def test_other_batches_differ_by_one_gray_level_at_most(tiny, whole, batch_size):
    assert apart(whole, sample(tiny, "<x>", n=8, batch_size=batch_size, **DRAW)).max() <= 1


@pytest.mark.parametrize("threads", [2])
def test_other_thread_counts_differ_by_one_gray_level_at_most(tiny, whole, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        other = sample(tiny, "<x>", n=8, **DRAW)
    finally:
        torch.set_num_threads(before)
    assert apart(whole, other).max() <= 1


def test_bfloat16_is_near_float32_and_nearer_than_another_seed(tiny, whole):
    half = load_base("tiny", device="cpu", dtype=torch.bfloat16)
    mean = apart(whole, sample(half, "<x>", n=8, **DRAW)).mean()
    assert 0 < mean <= 4
    assert apart(whole, sample(tiny, "<x>", n=8, **{**DRAW, "seed": 99})).mean() > 4 * mean


@pytest.mark.gpu
def test_a_gpu_in_float32_draws_the_same_images_up_to_two_gray_levels(whole):
    base = load_base("tiny", device="cuda", dtype=torch.float32)
    assert apart(whole, sample(base, "<x>", n=8, **DRAW)).mean() <= 2


def test_the_recorded_matrix_keeps_every_promise(tiny):
    rows = load_result("determinism", base_hash=tiny.hash)["rows"]
    assert len(rows) >= 14 and not [row for row in rows if row[""] == "NOT met"]
    unmeasured = [row["what"] for row in rows if row[""] == "not measured"]
    assert all("GPU" in what or "CPU" in what for what in unmeasured), unmeasured


def test_the_recorded_soak_is_long_and_flat():
    found = load_result("soak")
    rows, memory = found["rows"], found["memory_mib"]
    assert rows["images drawn, written and read"] >= 10_000 and len(memory) >= 100
    assert rows["growth, % (goal: below 5)"] < 5
    assert max(memory[20:]) < 1.05 * memory[19]
    assert len(set(found["open_files"][10:])) == 1
