import math
import sys
import types
import warnings
from contextlib import contextmanager

import pytest
import torch

from medbudget import Embedding, interpolate, load_base, sample, sample_to
from medbudget.base import NotFiniteError
from medbudget.images import load_images, read_record
from medbudget.sampling import ancestral_step, draw_noises, guide, make_sigmas, total_guidance

VECTORS = 0.3 * torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
MINE = Embedding(VECTORS, "<mine>")
OTHER = Embedding(1 - 3 * VECTORS, "<other>")


# k-diffusion imports a CLIP package for its evaluation scripts that new setuptools break
sys.modules.setdefault("clip", types.ModuleType("clip"))


def gray_levels(a, b):
    return int((a.int() - b.int()).abs().max())


def test_sigmas_equal_k_diffusions_discrete_schedule(tiny):
    sampling = pytest.importorskip("k_diffusion.external")
    trained = ((1 - tiny.alphas_cumprod) / tiny.alphas_cumprod) ** 0.5
    schedule = sampling.DiscreteSchedule(trained, quantize=False)
    sigmas, t = make_sigmas(tiny.alphas_cumprod, 25)
    torch.testing.assert_close(sigmas, schedule.get_sigmas(25), rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.sigma_to_t(sigmas[:-1]), t, rtol=0, atol=0.02)
    assert t[0] == 999 and t[-1] == 0 and sigmas[-1] == 0


def test_ancestral_steps_equal_k_diffusions(tiny):
    k = pytest.importorskip("k_diffusion.sampling")
    sigmas, _ = make_sigmas(tiny.alphas_cumprod, 10)
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


def test_guidance_identities():
    u, a, b = torch.randn(3, 2, 8, 4, 4).double()
    torch.testing.assert_close(guide(u, [a], [1.0], 2.0), u + 2 * (a - u))
    torch.testing.assert_close(guide(u, [a, a], [0.5, 0.5], 3.0), guide(u, [a], [1.0], 3.0))
    mixed = 0.25 * a + 0.75 * b
    torch.testing.assert_close(guide(u, [a, b], [0.25, 0.75], 2.0), guide(u, [mixed], [1.0], 2.0))
    torch.testing.assert_close(guide(u, [a, b], [0.2, 0.9], 2.0), guide(u, [b, a], [0.9, 0.2], 2.0))
    torch.testing.assert_close(guide(None, [a], [1.0], 1.0), a)
    # the paper's three diseases at .5 with scale 3: total guidance 4.5
    torch.testing.assert_close(guide(u, [a] * 3, [0.5] * 3, 3.0), u + 4.5 * (a - u))


def test_images_do_not_depend_on_their_batch(tiny):
    images = sample(tiny, "<mine>", embeddings=[MINE], n=5, steps=4, seed=3)
    again = sample(tiny, "<mine>", embeddings=[MINE], n=5, steps=4, seed=3)
    assert torch.equal(images, again)
    pairs = sample(tiny, "<mine>", embeddings=[MINE], n=5, steps=4, seed=3, batch_size=2)
    assert gray_levels(images, pairs) <= 1
    alone = sample(tiny, "<mine>", embeddings=[MINE], n=1, steps=4, seed=6)
    assert gray_levels(images[3:4], alone) <= 1
    assert gray_levels(images[0], images[1]) > 20
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.uint8


def test_composition_identities_on_the_base(tiny):
    options = {"embeddings": [MINE, OTHER], "n": 2, "steps": 4}
    one = sample(tiny, "<mine>", **options)
    assert gray_levels(sample(tiny, "<mine>:0.5 AND <mine>:0.5", **options), one) <= 1
    assert gray_levels(sample(tiny, "<mine> AND <other>:0", **options), one) <= 1
    ab = sample(tiny, "<mine>:0.3 AND <other>:0.7", **options)
    ba = sample(tiny, "<other>:0.7 AND <mine>:0.3", **options)
    assert gray_levels(ab, ba) <= 1 and gray_levels(ab, one) > 5


def test_unconditional_pass_is_skipped_only_at_zero_weight(tiny, monkeypatch):
    sizes = []
    predict = type(tiny).predict_noise

    def count(self, x, t, context):
        sizes.append(len(x))
        return predict(self, x, t, context)

    monkeypatch.setattr(type(tiny), "predict_noise", count)
    for scale in (1.0, 2.0, 0.0):
        sample(tiny, "<mine>", embeddings=[MINE], n=3, steps=1, cfg_scale=scale)
    assert sizes == [3, 6, 3]


def test_scale_zero_is_the_unconditional_image(tiny):
    zero = sample(tiny, "<mine>", embeddings=[MINE], n=1, steps=3, cfg_scale=0)
    assert torch.equal(zero, sample(tiny, "", n=1, steps=3, cfg_scale=1))


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


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("<none>", {}, "loaded are: <mine>"),
        ("<mine>", {"n": 0}, "n must be at least 1"),
        ("<mine>", {"steps": 0}, "steps must be"),
        ("<mine>", {"cfg_scale": math.nan}, "finite"),
        ("<mine>", {"size": 65}, "multiple of 16"),
        ("<mine> " * 10, {}, "80 positions, but 75 fit"),
    ],
)
def test_wrong_input(tiny, prompt, options, problem):
    with pytest.raises(ValueError, match=problem):
        sample(tiny, prompt, embeddings=[MINE], **options)


def test_an_unknown_plain_word_is_a_warning(tiny):
    with pytest.warns(UserWarning, match="does not know xylophone"):
        sample(tiny, "red xylophone", n=1, steps=1)


def test_other_sizes_and_other_widths(tiny):
    assert sample(tiny, "", n=1, steps=1, size=96).shape == (1, 3, 96, 96)
    wide = Embedding(torch.ones(1, 768), "<sd1>")
    with pytest.raises(ValueError, match=r"width 768.*SD 1\.x"):
        sample(tiny, "<sd1>", embeddings=[wide], n=1, steps=1)
    with pytest.raises(ValueError, match="two embeddings"):
        sample(tiny, "<mine>", embeddings=[MINE, MINE], n=1, steps=1)


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


def test_total_guidance():
    assert total_guidance("<a>:0.5 AND <b>:0.5 AND <c>:0.5", 3.0) == 4.5
    assert total_guidance("<a>:0.25 AND <b>:0.75", 2.0) == 2.0
    assert total_guidance("", 2.0) == 2.0


def test_interpolation_runs_from_one_embedding_to_the_other_with_the_same_noise(tiny):
    options = {"n": 2, "steps": 3, "seed": 4}
    ends = [sample(tiny, e.token, embeddings=[e], **options) for e in (MINE, OTHER)]
    for method in ("and", "vectors"):
        axis = interpolate(tiny, MINE, OTHER, weights=(0, 0.5, 1), method=method, **options)
        assert list(axis) == [0.0, 0.5, 1.0]
        assert gray_levels(axis[0.0], ends[0]) <= 1 and gray_levels(axis[1.0], ends[1]) <= 1
        assert gray_levels(axis[0.5], ends[0]) > 5 and gray_levels(axis[0.5], ends[1]) > 5
    half = sample(tiny, "<mine>:0.5 AND <other>:0.5", embeddings=[MINE, OTHER], **options)
    axis = interpolate(tiny, MINE, OTHER, weights=(0.5,), **options)
    assert gray_levels(axis[0.5], half) <= 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "slerp"}, "allowed are 'and', 'vectors'"),
        ({"weights": ()}, "finite numbers"),
        ({"weights": (0, math.inf)}, "finite numbers"),
        ({"method": "vectors", "b": Embedding(VECTORS[:3], "<few>")}, "equal shape"),
    ],
)
def test_wrong_interpolation(tiny, options, problem):
    with pytest.raises(ValueError, match=problem):
        interpolate(tiny, MINE, options.pop("b", OTHER), **options)


# ------------------------------------------------------------------- refused, or said


@contextmanager
def broken(parameter):
    kept = parameter.data.clone()
    parameter.data.view(-1)[0] = float("nan")
    try:
        yield
    finally:
        parameter.data.copy_(kept)


def test_nan_from_unet_vae_embedding_or_guidance_is_an_error_with_a_way_out(tiny):
    draw = {"n": 1, "steps": 2}
    for parameter in (tiny.unet.conv_in.weight, tiny.vae.decoder.conv_in.weight):
        with (
            broken(parameter),
            pytest.raises(NotFiniteError, match=r"NaN.*torch.float32.*guidance"),
        ):
            sample(tiny, "red ground", **draw)
    with broken(tiny.vae.encoder.conv_in.weight), pytest.raises(NotFiniteError, match="encoded"):
        tiny.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="its training diverged"):
        sample(tiny, "<x>", embeddings=Embedding(torch.full((4, 96), 1e25), "<x>"), **draw)
    with pytest.warns(UserWarning, match="guidance"), pytest.raises(NotFiniteError):
        sample(tiny, "red ground", n=1, steps=4, cfg_scale=1e30)
    with pytest.raises(NotFiniteError, match="latents hold NaN or infinity"):
        tiny.decode(torch.full((1, 8, 16, 16), math.inf))


def test_an_embedding_that_the_prompt_does_not_use_is_named(tiny):
    with pytest.warns(UserWarning, match=r"does not use <mine>, which is loaded"):
        sample(tiny, "red ground", embeddings=MINE, n=1, steps=1)
    base = load_base("small-random", device="cpu")  # where no unknown word is reported
    word = Embedding(torch.randn(4, 64), "<mine>")
    with pytest.warns(UserWarning, match="<mine>.*write it with its brackets"):
        sample(base, "mine", embeddings=[word], n=1, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(tiny, "<mine>", negative_prompt="<other>", embeddings=[MINE, OTHER], n=1, steps=1)


def test_extreme_guidance_gets_a_word(tiny):
    for prompt, scale in (("red", 100), ("red:50 AND blue:50", 2)):
        with pytest.warns(UserWarning, match=r"total guidance is [12]00 "):
            sample(tiny, prompt, n=1, steps=1, cfg_scale=scale)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63, 2**64 - 2])
def test_every_seed_that_torch_takes(tiny, seed):
    two = sample(tiny, "red", n=2, steps=1, seed=seed, batch_size=1)
    assert torch.equal(two[1], sample(tiny, "red", n=1, steps=1, seed=seed + 1)[0])


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63) - 1, 10**400, 1.5, "1"])
def test_other_seeds_are_a_clear_error(tiny, seed):
    with pytest.raises(ValueError, match=r"seed .*(beyond what PyTorch takes|whole number)"):
        sample(tiny, "red", n=2, steps=1, seed=seed)


def test_words_of_other_programs_are_told_the_right_call(tiny, tmp_path):
    for wrong, right in (
        ({"num_inference_steps": 5}, "steps"),
        ({"guidance_scale": 2}, "cfg_scale"),
    ):
        with pytest.raises(TypeError, match=rf"no option {next(iter(wrong))}: write {right} "):
            sample(tiny, "red", **wrong)
    with pytest.raises(TypeError, match="no option colour; see"):
        sample(tiny, "red", colour=1)
    MINE.save(tmp_path / "m.safetensors")
    draw = {"n": 1, "steps": 1}
    from_file = sample(tiny, "<mine>", embeddings=[tmp_path / "m.safetensors"], **draw)
    assert torch.equal(from_file, sample(tiny, "<mine>", embeddings=MINE, **draw))
    assert torch.equal(
        from_file, sample(tiny, "<mine>", embeddings=str(tmp_path / "m.safetensors"), **draw)
    )
    with pytest.raises(ValueError, match=r"<mine> is the name of a word.*Embedding\.load"):
        interpolate(tiny, "<mine>", "<other>")


# ------------------------------------------------------------------- into a folder


def test_sample_to_goes_on_where_it_was_and_overwrites_nothing(tiny, tmp_path):
    options = {"embeddings": MINE, "n": 20, "steps": 2, "seed": 3}
    paths = sample_to(tmp_path / "a", tiny, "<mine>", **options)
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(20)]
    whole = load_images(paths)
    first = sample(tiny, "<mine>", embeddings=MINE, n=16, steps=2, seed=3)
    assert torch.equal(whole[:16], first)
    assert read_record(paths[7])["seed"] == 10 and read_record(paths[7])["prompt"] == "<mine>"
    kept = paths[2].stat().st_mtime_ns
    for path in paths[16:18]:
        path.unlink()
    assert sample_to(tmp_path / "a", tiny, "<mine>", **options) == paths
    assert torch.equal(load_images(paths), whole) and paths[2].stat().st_mtime_ns == kept
    with pytest.raises(FileExistsError, match=r"steps \(2 there, 3 now\)"):
        sample_to(tmp_path / "a", tiny, "<mine>", **{**options, "steps": 3})
    assert torch.equal(load_images(paths), whole)
    sample_to(tmp_path / "a", tiny, "<mine>", **{**options, "steps": 3}, overwrite=True)
    assert not torch.equal(load_images(paths), whole)


def test_an_empty_prompt_gets_a_word(tiny, tmp_path, capsys):
    sample_to(tmp_path, tiny, " ", n=1, steps=1)
    assert "the prompt is empty" in capsys.readouterr().out


def test_a_batch_is_compiled_for_where_it_pays_and_said(tiny, monkeypatch, capsys):
    from medbudget import gpu

    compiled = []
    monkeypatch.setattr(gpu, "speed_up", lambda base: compiled.append(base) or base)
    for fast, work in ((None, 10_000), (False, 10_000), (True, 1)):
        gpu.choose_speed(tiny, fast, work)  # a CPU: only where it is asked for
    assert len(compiled) == 1 and capsys.readouterr().out == ""

    class OnGpu:
        device, fast = torch.device("cuda"), False

    for fast, work in ((None, 299), (False, 300), (None, 300)):
        gpu.choose_speed(OnGpu(), fast, work)
    assert len(compiled) == 2 and "--no-fast" in capsys.readouterr().out


@pytest.mark.realdata
def test_the_authors_embeddings_compose_at_the_width_of_sd2(tiny, real_data):
    """Their real files in prompts, on random networks of the right width: shapes only."""
    from dataclasses import replace

    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    names = ("chexpert_healthy", "prostate_neg")
    words = [Embedding.load(real_data / "embeddings" / f"{name}.pt") for name in names]
    text = {**tiny.text_encoder.config.to_dict(), "hidden_size": 1024, "num_attention_heads": 8}
    unet = {**tiny.unet.config, "cross_attention_dim": 1024}
    wide = replace(
        tiny,
        name="wide",
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)).eval(),
        unet=UNet2DConditionModel(**unet).eval(),
    )
    tokens = [word.token for word in words]
    with torch.no_grad():
        assert wide.text(tokens[0], embeddings=words).shape == (1, 77, 1024)
    both = f"{tokens[0]}:0.25 AND {tokens[1]}:0.75"
    assert sample(wide, both, embeddings=words, n=1, steps=1).shape == (1, 3, 64, 64)
    axis = interpolate(wide, *words, weights=(0.5,), n=1, steps=1)
    assert axis[0.5].shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="128 positions"):
        sample(wide, " ".join(tokens), embeddings=words, n=1, steps=1)
