import threading
from dataclasses import replace

import pytest
import torch

from medbudget import Embedding, describe, load_base, make_phantoms
from medbudget.known import BaseError
from medbudget.loading import TINY, load_parts
from medbudget.tiny import FOLDER, SPECS, load_trained

IMAGES = make_phantoms("chest", "healthy", 18).images


def test_tiny_is_small_and_has_the_shape_of_stable_diffusion(tiny):
    total = sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file())
    assert total < 30 * 2**20
    assert sum(p.numel() for p in tiny.unet.parameters()) < 8e6
    assert (tiny.size, tiny.factor, tiny.width, tiny.preset) == (64, 4, 96, "tiny")
    # Stable Diffusion's schedule: sigma at the last step, known from k-diffusion, is 14.6146
    a = tiny.alphas_cumprod[-1]
    assert abs(float(((1 - a) / a) ** 0.5) - 14.6146) < 1e-3


def test_hash_is_the_same_in_every_dtype(tiny):
    for dtype in (torch.float16, torch.bfloat16):
        base = load_base("tiny", device="cpu", dtype=dtype)
        assert base.hash == tiny.hash and next(base.unet.parameters()).dtype == dtype


def test_autoencoder_returns_what_it_was_given(tiny):
    back = tiny.decode(tiny.encode(IMAGES))
    mse = ((back.float() - IMAGES.float()) ** 2).mean((1, 2, 3))
    psnr = 10 * (255**2 / mse).log10()
    assert psnr.mean() > 24
    assert torch.equal(tiny.decode(tiny.encode(IMAGES[:16])), back[:16])
    mean, std = tiny.encode_posterior(IMAGES[:2])
    drawn = tiny.encode(IMAGES[:2], generator=torch.Generator().manual_seed(0))
    assert 0.3 < float(((drawn - mean) / std).std()) < 3


def test_visual_words_know_places(tiny):
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    image[0, 0, :, 32:] = 255
    image[1, 2, 32:] = 255
    first, second = (describe(tiny, image[i : i + 1]).split() for i in range(2))
    assert len(first) == 60 and first[0][0] == "g" and first[1][0] == "v"
    # third row of the 3x3 grid, left column: black in the one, blue in the other
    numbers = tiny.words["cells"].float()
    left = numbers[int(first[2 + 6][1:])]
    below = numbers[int(second[2 + 6][1:])]
    assert left[:3].max() < -0.7
    assert below[2] > 0.7 and below[:2].max() < -0.7
    with torch.no_grad():
        assert tiny.text(describe(tiny, image)).shape == (1, 77, 96)


def test_an_unknown_base_lists_the_allowed_ones(tmp_path):
    with pytest.raises(BaseError, match=r"'tiny'.*'sd2'.*folder"):
        load_base("sd3")
    with pytest.raises(BaseError, match=r"\(did you mean 'sd21-base'\?\): allowed"):
        load_base("sd21base")
    for name in ("512-base-ema.ckpt", "a/b.safetensors", "/no/such/folder"):
        with pytest.raises(BaseError, match=f"no such file or folder: {name}"):
            load_base(name)
    with pytest.raises(BaseError, match="lacks vae, unet"):
        load_base(tmp_path)
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(BaseError, match=r"x\.ckpt is truncated"):
        load_base(tmp_path / "x.ckpt")


def test_sd2_without_weights_names_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MEDBUDGET_SD2", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseError, match=r"MEDBUDGET_SD2.*--base tiny"):
        load_base("sd2")
    monkeypatch.setenv("MEDBUDGET_SD2", str(tmp_path / "none"))
    with pytest.raises(BaseError, match="not a folder"):
        load_base("sd2")


def test_weights_that_are_nan_are_refused_at_once(monkeypatch):
    parts = load_parts("small-random")
    next(parts.unet.parameters()).data[0] = float("nan")
    monkeypatch.setattr("medbudget.loading.load_parts", lambda name: parts)
    with pytest.raises(BaseError, match="weights of the U-Net are NaN or infinity"):
        load_base("small-random", device="cpu")


def test_shipped_embeddings_belong_to_the_shipped_base(tiny):
    assert len(list(FOLDER.glob("*"))) == len(SPECS) == 15
    for kind, label, n_vectors, cases in SPECS:
        word = load_trained(kind, label, tiny, n_vectors=n_vectors, cases=cases)
        assert word.vectors.shape == (n_vectors, 96) and word.token == f"<{label}>"
        assert word.record["images"] == cases and word.history["loss"]
    with pytest.raises(ValueError, match=r"for the base 'tiny', this one is 'sd2'.*find_word"):
        load_trained("prostate", "tumour", replace(tiny, name="sd2"))


def test_cuda_without_a_gpu_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BaseError, match="no CUDA device"):
        load_base("tiny", device="cuda")


def test_v_prediction_is_turned_into_epsilon_as_diffusers_scheduler_does(tiny):
    from diffusers import EulerAncestralDiscreteScheduler

    base = replace(load_base("small-random", device="cpu"), prediction="v_prediction")
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", timestep_spacing="linspace",
    )  # fmt: skip
    scheduler.set_timesteps(1000)  # whole timesteps: both interpolate in their own way between
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = base.text("a").expand(2, -1, -1)
        for i in (0, 300, 700, 998):
            t, sigma = scheduler.timesteps[i], scheduler.sigmas[i]
            at = sigma * x
            scaled = at / (sigma**2 + 1) ** 0.5
            v = base.unet(scaled, t, encoder_hidden_states=context).sample
            scheduler._step_index = i
            scheduler.is_scale_input_called = True
            theirs = scheduler.step(v, t, at, generator=torch.Generator()).pred_original_sample
            ours = at - sigma * base.predict_noise(scaled, t.expand(2), context)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(sigma))


def test_two_threads_on_one_base_never_see_each_others_words(tiny):
    words = [Embedding(torch.randn(8, 96, generator=torch.Generator().manual_seed(i)), f"<{i}>")
             for i in range(2)]  # fmt: skip
    wrong, calls = [], []
    with torch.no_grad():
        wanted = [tiny.text(word.token, embeddings=word) for word in words]

    def encode(i):
        with torch.no_grad():
            for _ in range(60):
                calls.append(i)
                if not torch.equal(tiny.text(words[i].token, embeddings=words[i]), wanted[i]):
                    wrong.append(i)
                if not torch.equal(tiny.token_rows("*"), star):
                    wrong.append("vocabulary")

    star = tiny.token_rows("*")
    threads = [threading.Thread(target=encode, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 240 and not wrong
    assert not tiny.text_encoder.get_input_embeddings()._forward_hooks
