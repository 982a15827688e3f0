"""The classifier: what it learns, what it refuses, and that a killed run ends as a whole one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medbudget.cases import Cases
from medbudget.classifier import (
    Classifier,
    ClassifierSettings,
    saliency,
    train_classifier,
)
from medbudget.networks import make_network, resize
from medbudget.studies.comparison import judge_gain, score_gain, score_runs

FAST = ClassifierSettings.preset(
    "tiny", size=32, steps=12, batch_size=8, validate_every=3, frozen=8, checkpoint_every=3
)


def dots(n, seed, gap=70, size=32):
    """Noise; class 1 has a brighter middle."""
    rng = np.random.default_rng(seed)
    images = rng.normal(100, 25, (2 * n, 3, size, size))
    images[n:, :, 8:24, 8:24] += gap
    images = torch.from_numpy(images.clip(0, 255).astype(np.uint8))
    return Cases.of(images[:n], images[n:])


@pytest.fixture(scope="module")
def splits():
    return dots(16, 0), dots(12, 1), dots(12, 2)


@pytest.fixture(scope="module")
def trained(splits):
    train, val, _ = splits
    return train_classifier(train, val, replace(FAST, steps=40))


def test_it_learns_what_can_be_seen_and_guesses_where_there_is_nothing(splits, trained):
    _, score = trained.test(splits[2])
    assert score.value > 0.9 and score.interval[0] > 0.7
    none = dots(12, 0, gap=0), dots(12, 1, gap=0)
    blind = train_classifier(*none, FAST)
    assert blind.test(dots(60, 2, gap=0))[1].value == pytest.approx(0.5, abs=0.15)


def test_the_best_validation_is_kept(splits, trained):
    history = trained.record["history"]
    best = max(history["aucs"])
    assert trained.record["best_auc"] == best
    assert trained.record["best_step"] == history["steps"][history["aucs"].index(best)]
    from medbudget.metrics import compute_auc

    assert compute_auc(splits[1].labels.numpy(), trained.predict(splits[1].images)) == best


def test_testing_twice_is_visible(splits, trained):
    before = len(trained.record["tests"])
    other = dots(4, 9)
    assert "tested once" in trained.test(other)[1].note
    assert "tested 2 times" in trained.test(other)[1].note
    assert len(trained.record["tests"]) == before + 2
    with pytest.raises(ValueError, match="these are the val cases"):
        trained.test(splits[1])


def test_a_stopped_run_goes_on_and_gives_the_same_test_scores(splits, tmp_path):
    train, val, test = splits
    whole = train_classifier(train, val, FAST)
    path = tmp_path / "run.ckpt"

    def kill(state):
        if state["step"] == 9:  # after the checkpoint of step 6, before that of step 9
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(train, val, FAST, checkpoint=path, callback=kill)
    steps = []
    resumed = train_classifier(
        train, val, FAST, checkpoint=path, callback=lambda state: steps.append(state["step"])
    )
    assert steps == [9, 12]
    assert resumed.record["history"] == whole.record["history"]
    scores = whole.predict(test.images)
    assert np.array_equal(resumed.predict(test.images), scores)
    other = train_classifier(train, val, replace(FAST, seed=1))
    assert not np.array_equal(other.predict(test.images), scores)
    with pytest.raises(ValueError, match="another run: train differ"):
        train_classifier(dots(16, 5), val, FAST, checkpoint=path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        train_classifier(train, val, FAST, checkpoint=path)


def test_frozen_stages_stay_and_the_others_move(splits):
    train, val, _ = splits
    settings = replace(FAST, frozen=7, steps=3)
    start = make_network(settings).state_dict()
    end = train_classifier(train, val, settings).network.state_dict()
    moved = {k.split(".")[1] for k in start if k[:6] == "stages" and not start[k].equal(end[k])}
    assert moved == {"7", "8"}
    assert not start["head.weight"].equal(end["head.weight"])


def test_the_networks_are_those_of_torchvision_and_timm():
    import timm
    from torchvision.models import resnet18

    from medbudget.weights import efficientnet_network

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    paper = ClassifierSettings.preset("paper", weights="none")
    mine = make_network(paper).eval()
    theirs = resnet18(weights=None).eval()
    names = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    parts = [mine.stages[0][0], mine.stages[0][1], *mine.stages[1:]]
    for name, part in zip(names, parts):
        part.load_state_dict(getattr(theirs, name).state_dict())
    theirs.fc = mine.head
    assert torch.allclose(mine(images), theirs(images), atol=1e-4)
    assert sum(p.numel() for p in mine.parameters()) == 11_177_538  # ResNet-18 with two classes
    lite = make_network(ClassifierSettings.preset("tiny")).eval()
    features, _ = efficientnet_network(torch.device("cpu"))
    want = lite.head(features((images * 255 - 127) / 128))
    assert torch.allclose(lite(images), want, atol=1e-3)
    assert isinstance(timm.create_model("tf_efficientnet_lite0"), torch.nn.Module)


def test_the_papers_resize_takes_neighbours_and_the_modern_one_averages():
    lines = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    lines[..., ::2] = 200
    assert resize(lines, 16, antialias=True).float().std() < 30
    sharp = torch.nn.functional.interpolate(lines.float(), (16, 16), mode="bilinear")
    assert torch.equal(resize(lines, 16, antialias=False).float(), sharp.round())
    assert torch.equal(resize(lines, 64, antialias=True), lines)


def test_scores_of_runs_by_hand():
    from medbudget.metrics import Estimate

    labels = [0, 0, 1, 1]
    runs = [[0.1, 0.4, 0.6, 0.9], [0.1, 0.7, 0.6, 0.9]]  # AUC 1 and .75
    found = {score.name: score for score in score_runs(labels, runs, repeats=50)}
    assert found["AUC"].value == 0.875 and found["AUC"].n == (2, 2)
    assert found["sd of runs"].value == pytest.approx(0.25 / 2**0.5)
    assert "sd of runs" not in {s.name for s in score_runs(labels, runs[0], repeats=50)}
    gain, least = score_gain(Estimate(0.02, 0.01, (0.0, 0.04), "bootstrap", 0.05), (2, 2))
    assert gain.value == 0.02 and "p = 0.05" in gain.note
    assert least.value == pytest.approx(2.801585 * 0.01, rel=1e-5)
    four = [labels * 4, np.tile(runs, 4)]
    alone, apart, whole = (
        score_runs(*data, repeats=50, patients=patients)[0]
        for data, patients in (((labels, runs), None), (four, None), (four, list("abcd") * 4))
    )
    assert whole.interval == alone.interval and "4 patients" in whole.note
    assert apart.interval != alone.interval and "cases" in apart.note


def test_the_verdict_by_hand():
    from medbudget.metrics import Estimate

    def judge(value, se):
        return judge_gain(Estimate(value, se, (value - 2 * se, value + 2 * se), "bootstrap", 0.04))

    assert judge(0.05, 0.01).startswith("a gain is shown (+0.050, interval +0.030 to +0.070")
    assert judge(-0.05, 0.01).startswith("a loss is shown")
    least = 2.801585 * 0.03  # the normal quantiles of power 80 % and level 5 %
    for value in (0.05, -0.05, 0.0):
        assert judge(value, 0.03).endswith(f"); {least:.3f} could have been found")
        assert judge(value, 0.03).startswith("no gain shown")


def test_cases_and_settings_that_cannot_be_are_refused(splits):
    images = splits[0].images
    with pytest.raises(ValueError, match="two classes"):
        Cases(images, torch.zeros(32, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels for"):
        Cases(images, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="resnet18, efficientnet-lite0"):
        ClassifierSettings(network="vgg")
    with pytest.raises(ValueError, match="allowed are paper, modern, "):
        ClassifierSettings.preset("best")
    with pytest.raises(ValueError, match="frozen must be 0 to 9"):
        make_network(replace(FAST, frozen=10))


def test_missing_resnet_weights_say_what_to_do(monkeypatch, tmp_path):
    from medbudget.metrics import WeightsError

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(WeightsError, match=r"could not be downloaded .*--weights PATH"):
        make_network(ClassifierSettings.preset("paper"))


def test_saliency_is_the_weighted_sum_of_maps_by_hand():
    """The slopes of Grad-CAM by finite differences, 16 maps of 32 x 32."""
    settings = replace(FAST, size=64)
    network = make_network(settings).eval().double()
    images = dots(1, 3, size=64).images
    maps = saliency(Classifier(network, settings, ("a", "b")), images, stage=1)
    shown = 0
    with torch.no_grad():
        features = network.run(network.normalize(images.double() / 255), stop=2)

        def logits(x):
            return network.decide(network.run(x, start=2))[:, 1]

        step = 1e-7
        weights = torch.zeros(features.shape[:2], dtype=torch.float64)
        for channel in range(features.shape[1]):
            move = torch.zeros_like(features)
            move[:, channel] = step
            change = logits(features + move) - logits(features - move)
            weights[:, channel] = change / (2 * step) / features[0, 0].numel()
        cam = (weights[:, :, None, None] * features).sum(1, keepdim=True).relu()
        wanted = torch.nn.functional.interpolate(cam, (64, 64), mode="bilinear")[:, 0]
        for mine, theirs in zip(maps, wanted):
            shown += bool(theirs.max() > 0)
            assert np.allclose(mine, theirs / theirs.max().clamp(min=1e-12), atol=1e-5)
    assert shown, "an image that speaks for class 1"


def test_saliency_lies_where_the_classes_differ():
    def corner(n, seed):  # class 1 has a bright upper left quarter
        cases = dots(n, seed, gap=0, size=64)
        cases.images[n:, :, :24, :24] = 250
        return cases

    settings = replace(FAST, size=64, steps=40, augment="none", frozen=5)
    made = train_classifier(corner(16, 0), corner(12, 1), settings)
    maps = saliency(made, corner(6, 2).images[6:], stage=5)
    assert maps.shape == (6, 64, 64) and maps.min() >= 0 and maps.max() == pytest.approx(1)
    assert maps[:, :32, :32].mean() > 2 * maps[:, 32:, 32:].mean()


def test_it_learns_in_half_precision_too(splits):
    train, val, test = splits
    made = train_classifier(train, val, replace(FAST, steps=40, precision="bfloat16"))
    assert made.test(test)[1].value > 0.9


@pytest.mark.gpu
def test_on_a_gpu_it_learns_too(splits):
    train, val, test = splits
    made = train_classifier(train, val, replace(FAST, steps=40), device="cuda")
    assert made.test(test)[1].value > 0.9
