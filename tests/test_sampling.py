import math
import sys
import types
import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from medbudget import Embedding, load_base, sample, verify
from medbudget.base import NotFiniteError
from medbudget.known import KNOWN
from medbudget.sampling.sampler import (
    Condition,
    ancestral_step,
    draw_noises,
    guide,
    make_sigmas,
    total_guidance,
)

VECTORS = 0.3 * torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
MINE = Embedding(VECTORS, "<mine>")
OTHER = Embedding(1 - 3 * VECTORS, "<other>")


# k-diffusion imports a CLIP package for its evaluation scripts that new setuptools break
sys.modules.setdefault("clip", types.ModuleType("clip"))


def gray_levels(a, b):
    return int((a.int() - b.int()).abs().max())


def test_sigmas_and_ancestral_steps_equal_k_diffusions(tiny):
    external = pytest.importorskip("k_diffusion.external")
    k = pytest.importorskip("k_diffusion.sampling")
    trained = ((1 - tiny.alphas_cumprod) / tiny.alphas_cumprod) ** 0.5
    schedule = external.DiscreteSchedule(trained, quantize=False)
    sigmas, t = make_sigmas(tiny.alphas_cumprod, 10)
    torch.testing.assert_close(sigmas, schedule.get_sigmas(10), rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.sigma_to_t(sigmas[:-1]), t, rtol=0, atol=0.02)
    assert t[0] == 999 and t[-1] == 0 and sigmas[-1] == 0
    x = torch.randn(2, 8, 4, 4) * sigmas[0]
    noises = [torch.randn_like(x) for _ in range(10)]

    def model(x, sigma, **_):
        return torch.tanh(x) / (1 + sigma.view(-1, 1, 1, 1))

    queue = iter(noises)
    expected = k.sample_euler_ancestral(
        model, x, sigmas, noise_sampler=lambda *_: next(queue), disable=True
    )
    for i in range(10):
        denoised = model(x, sigmas[i].expand(2))
        x = ancestral_step(x, denoised, float(sigmas[i]), float(sigmas[i + 1]), noises[i])
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_the_sampler_of_a_golden_picture_equals_k_diffusions(tiny):
    external = pytest.importorskip("k_diffusion.external")
    k = pytest.importorskip("k_diffusion.sampling")
    denoiser = external.DiscreteEpsDDPMDenoiser(
        tiny.predict_noise, tiny.alphas_cumprod, quantize=False
    )
    empty, text = tiny.text(""), tiny.text("red ground")

    def model(x, sigma):
        away, to = denoiser(x, sigma, context=empty), denoiser(x, sigma, context=text)
        return away + 7.5 * (to - away)

    sigmas = k.get_sigmas_karras(5, float(denoiser.sigmas[0]), float(denoiser.sigmas[-1]))
    noise = torch.randn(1, *tiny.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = k.sample_dpmpp_2m(model, noise * sigmas[0], sigmas, disable=True)
    ours = verify.sample_dpmpp_2m(tiny, noise, Condition.encode(tiny, "red ground", (), "", 7.5), 5)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("row", [row for row in KNOWN if row.golden], ids=lambda row: row.name)
def test_each_golden_picture_can_be_drawn(tiny, row, monkeypatch):
    monkeypatch.setattr(verify, "GUIDANCE", 1.5)  # more of it, and tiny's pixels leave [0, 1]
    values = {
        colour: verify.draw_golden(tiny, replace(row.golden, prompt=f"{colour} ground"), size=64)
        for colour in ("black", "white")
    }
    assert all(
        drawn.shape == (9,) and drawn.min() >= 0 and drawn.max() <= 1 for drawn in values.values()
    )
    assert np.abs(values["black"] - values["white"]).max() > 0.05


def test_guidance_identities():
    u, a, b = torch.randn(3, 2, 8, 4, 4).double()
    torch.testing.assert_close(guide(u, [a], [1.0], 2.0), u + 2 * (a - u))
    torch.testing.assert_close(guide(u, [a, a], [0.5, 0.5], 3.0), guide(u, [a], [1.0], 3.0))
    mixed = 0.25 * a + 0.75 * b
    torch.testing.assert_close(guide(u, [a, b], [0.25, 0.75], 2.0), guide(u, [mixed], [1.0], 2.0))
    torch.testing.assert_close(guide(None, [a], [1.0], 1.0), a)
    # the paper's three diseases at .5 with scale 3
    torch.testing.assert_close(guide(u, [a] * 3, [0.5] * 3, 3.0), u + 4.5 * (a - u))
    assert total_guidance("<a>:0.5 AND <b>:0.5 AND <c>:0.5", 3.0) == 4.5


def test_composition_identities_on_the_base(tiny):
    options = {"embeddings": [MINE, OTHER], "n": 2, "steps": 3}
    with warnings.catch_warnings(action="ignore"):
        one = sample(tiny, "<mine>", **options)
        assert gray_levels(sample(tiny, "<mine>:0.5 AND <mine>:0.5", **options), one) <= 1
    assert gray_levels(sample(tiny, "<mine> AND <other>:0", **options), one) <= 1
    ab = sample(tiny, "<mine>:0.3 AND <other>:0.7", **options)
    ba = sample(tiny, "<other>:0.7 AND <mine>:0.3", **options)
    assert gray_levels(ab, ba) <= 1 and gray_levels(ab, one) > 5


def test_unconditional_pass_is_skipped_only_at_zero_weight(tiny, monkeypatch):
    sizes, images = [], []
    predict = type(tiny).predict_noise

    def count(self, x, t, context):
        sizes.append(len(x))
        return predict(self, x, t, context)

    monkeypatch.setattr(type(tiny), "predict_noise", count)
    for scale in (1.0, 2.0, 0.0):
        images = sample(tiny, "<mine>", embeddings=[MINE], n=3, steps=1, cfg_scale=scale)
    assert sizes == [3, 6, 3]
    assert torch.equal(images, sample(tiny, "", n=3, steps=1, cfg_scale=1)), "scale 0: no prompt"


def test_diffusers_pipeline_agrees(tiny):
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

    from medbudget.loading import TINY

    pipe = StableDiffusionPipeline.from_pretrained(
        TINY, safety_checker=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="linspace"
    )
    steps, seeds, prompt = 8, (5, 6), "large black ellipse left"
    start = next(draw_noises(seeds, (8, 16, 16)))
    # diffusers draws the ancestral noise from the same per-image streams, after the start
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    for g in generators:
        torch.randn((8, 16, 16), generator=g)
    out = pipe(
        [prompt] * 2, num_inference_steps=steps, guidance_scale=2.0, generator=generators,
        latents=start, output_type="pt",
    ).images  # fmt: skip
    theirs = (out * 255).round().byte()
    ours = sample(tiny, prompt, n=2, steps=steps, seed=5)
    difference = (ours.int() - theirs.int()).abs().float()
    # sigmas differ by up to 8.5e-5 (linear against log-linear interpolation), and the last step
    assert difference.mean() < 1.0 and difference.max() <= 12


def test_callback_sees_every_step_of_every_block(tiny):
    seen = []
    sample(tiny, "", n=3, steps=2, batch_size=2, callback=lambda s: seen.append(s))
    assert [(s["first"], s["step"]) for s in seen] == [(0, 1), (0, 2), (2, 1), (2, 2)]
    assert seen[0]["sigma"] > seen[1]["sigma"] and len(seen[2]["denoised"]) == 1


WIDE = Embedding(torch.ones(1, 768), "<sd1>")


def test_a_list_of_prompts_and_a_size_of_0_are_refused(tiny):
    with pytest.raises(TypeError, match="a prompt is one text"):
        sample(tiny, ["red ground"], n=1, steps=1)
    with pytest.raises(ValueError, match="size 0 does not fit"):
        sample(tiny, "red ground", n=1, steps=1, size=0)


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("<none>", {}, "loaded are: <mine>"),
        ("<mine>", {"n": 0}, "n must be at least 1, got 0"),
        ("<mine>", {"n": 1.5}, "n must be a whole number, got 1.5"),
        ("<mine>", {"steps": "4"}, "steps must be a whole number, got '4'"),
        ("<mine>", {"cfg_scale": math.nan}, "cfg_scale must be a finite number such as 2, got nan"),
        ("<mine>", {"cfg_scale": "2"}, "cfg_scale must be a number, got '2'"),
        ("<mine>", {"size": 65}, "multiple of 16"),
        ("<mine>", {"seed": 2**64}, "seed must be -9223372036854775808 to 18446744073709551615"),
        ("<mine>", {"seed": 2**64 - 1, "n": 2}, "last image's seed must be"),
        ("<mine>", {"seed": -(10**400)}, "seed must be"),
        ("<mine>", {"seed": 1.5}, "seed must be a whole number"),
        ("<mine> " * 10, {}, "80 positions, but 75 fit"),
        ("<sd1>", {"embeddings": [WIDE]}, r"width 768.*SD 1\.x"),
        ("<mine>", {"embeddings": [MINE, MINE]}, "two embeddings are called <mine>"),
    ],
)
def test_wrong_input(tiny, prompt, options, problem):
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=problem):
        sample(tiny, prompt, **{"embeddings": [MINE], "n": 1, "steps": 1, **options})


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 2, np.int64(3)])
def test_every_seed_that_torch_takes(tiny, seed):
    two = sample(tiny, "red", n=2, steps=1, seed=seed, batch_size=1)
    assert torch.equal(two[1], sample(tiny, "red", n=1, steps=1, seed=int(seed) + 1)[0])
    assert sample(tiny, "", n=1, steps=1, size=96, seed=seed).shape == (1, 3, 96, 96)


def test_a_batch_that_does_not_fit_is_halved_and_the_images_stay(tiny, monkeypatch):
    options = {"embeddings": [MINE], "n": 5, "steps": 3, "seed": 2}
    whole = sample(tiny, "<mine>", **options)
    predict, limit, sizes = type(tiny).predict_noise, 4, []

    def short_of_memory(self, x, t, context):
        sizes.append(len(x))
        if len(x) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(self, x, t, context)

    monkeypatch.setattr(type(tiny), "predict_noise", short_of_memory)
    with pytest.warns(UserWarning, match="batch of 5 images does not fit .* going on with 2"):
        halved = sample(tiny, "<mine>", **options)
    # both conditions of 5 images, then of 2 + 2 + 1
    assert sizes == [10, *[4] * 6, *[2] * 3]
    assert halved.shape == whole.shape and gray_levels(whole, halved) <= 1
    limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match="not even one image"):
        sample(tiny, "<mine>", **{**options, "n": 1})


# ------------------------------------------------------------------- refused, or said


@contextmanager
def broken(parameter):
    kept = parameter.data.clone()
    parameter.data.view(-1)[0] = float("nan")
    try:
        yield
    finally:
        parameter.data.copy_(kept)


def test_nan_from_unet_vae_or_guidance_is_an_error_with_a_way_out(tiny):
    for parameter in (tiny.unet.conv_in.weight, tiny.vae.decoder.conv_in.weight):
        with broken(parameter), pytest.raises(NotFiniteError, match=r"NaN.*float32.*guidance"):
            sample(tiny, "red ground", n=1, steps=2)
    with broken(tiny.vae.encoder.conv_in.weight), pytest.raises(NotFiniteError, match="encoded"):
        tiny.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.warns(UserWarning, match="guidance"), pytest.raises(NotFiniteError):
        sample(tiny, "red ground", n=1, steps=4, cfg_scale=1e30)


def test_what_cannot_be_meant_gets_a_word(tiny):
    draw = {"n": 1, "steps": 1}
    with pytest.warns(UserWarning, match="does not know xylophone"):
        sample(tiny, "red xylophone", **draw)
    for prompt, scale in (("red", 100), ("red:50 AND blue:50", 2)):
        with pytest.warns(UserWarning, match=r"total guidance is [12]00 "):
            sample(tiny, prompt, cfg_scale=scale, **draw)
    with pytest.warns(UserWarning, match=r"does not use <mine>, which is loaded"):
        sample(tiny, "red ground", embeddings=MINE, **draw)
    base = load_base("small-random", device="cpu")  # where no unknown word is reported
    word = Embedding(torch.randn(4, 64), "<mine>")
    with pytest.warns(UserWarning, match="<mine>.*write it with its brackets"):
        sample(base, "mine", embeddings=[word], **draw)
    with warnings.catch_warnings(action="error"):
        sample(tiny, "<mine>", negative_prompt="<other>", embeddings=[MINE, OTHER], **draw)


def test_words_of_other_programs_are_told_the_right_call(tiny, tmp_path):
    for wrong, right in (("num_inference_steps", "steps"), ("guidance_scale", "cfg_scale")):
        with pytest.raises(TypeError, match=rf"no option {wrong}: write {right} "):
            sample(tiny, "red", **{wrong: 2})
    with pytest.raises(TypeError, match="no option colour; see"):
        sample(tiny, "red", colour=1)
    path = MINE.save(tmp_path / "m.safetensors")
    draw = {"n": 1, "steps": 1}
    own = sample(tiny, "<mine>", embeddings=MINE, **draw)
    for embeddings in ([path], str(path)):
        assert torch.equal(sample(tiny, "<mine>", embeddings=embeddings, **draw), own)
    with pytest.raises(FileNotFoundError, match="<mine>, which is the name of a word"):
        sample(tiny, "<mine>", embeddings="<mine>")


def test_the_network_is_compiled_where_it_pays_and_that_is_said(tiny, monkeypatch, capsys):
    from medbudget import base

    compiled = []
    monkeypatch.setattr(base, "speed_up", lambda base: compiled.append(base) or base)
    for fast, work in ((None, 10_000), (False, 10_000), (True, 1)):
        base.choose_speed(tiny, fast, work)  # a CPU: only where it is asked for
    assert len(compiled) == 1 and capsys.readouterr().out == ""
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), fast=False)
    for fast, work in ((None, 299), (False, 300), (None, 300)):
        base.choose_speed(on_gpu, fast, work)
    assert len(compiled) == 2 and "--no-fast" in capsys.readouterr().out
