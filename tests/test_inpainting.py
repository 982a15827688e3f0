import math

import numpy as np
import pytest
import torch
from PIL import Image

from medbudget import Embedding, make_phantoms
from medbudget.base import NotFiniteError
from medbudget.data.phantoms import find_tumours
from medbudget.images import save_images
from medbudget.pictures import ImageError
from medbudget.sampling.inpainting import inpaint, start_step
from medbudget.sampling.masks import (
    blur_masks,
    check_masks,
    ellipse,
    fill_masked,
    latent_masks,
    read_mask,
    seam_ratio,
)

VECTORS = 0.3 * torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
MINE = Embedding(VECTORS, "<mine>")
OTHER = Embedding(1 - 3 * VECTORS, "<other>")
HEALTHY = make_phantoms("prostate", "healthy", 2).images
MASK = ellipse((0.5, 0.55), (0.2, 0.15))


def gray_levels(a, b):
    return int((a.int() - b.int()).abs().max())


# ---- masks --------------------------------------------------------------------------------------


def test_ellipse_covers_what_geometry_says():
    mask = ellipse((0.25, 0.5), (0.1, 0.2), size=400)
    assert mask.mean().item() == pytest.approx(math.pi * 0.1 * 0.2, rel=1e-3)
    assert mask[200, 100] == 1 and mask[200, 300] == 0  # x to the right, y down
    assert mask[200, 138] == 1 and mask[200, 142] == 0 and mask[278, 100] == 1
    turned = ellipse((0.25, 0.5), (0.1, 0.2), angle=math.pi / 2, size=400)
    torch.testing.assert_close(
        turned, ellipse((0.25, 0.5), (0.2, 0.1), size=400), atol=1e-3, rtol=0
    )
    for wrong in ({"radii": (0, 1)}, {"center": (math.nan, 0)}):
        with pytest.raises(ValueError, match="fractions of the edge, not in pixels"):
            ellipse(**{"center": (0.5, 0.5), "radii": (0.1, 0.1), **wrong})


def test_masks_of_every_kind_are_the_same_mask(tmp_path):
    expected = torch.zeros(1, 8, 8)
    expected[0, 2:5, 3:6] = 1
    array = expected[0].numpy()
    save_images((expected * 255).byte().expand(3, 8, 8)[None], tmp_path, names=["m"])
    kinds = [array, array.astype(bool), array.astype(int), (array * 255).astype(np.uint8)]
    for kind in [*kinds, expected, expected.bool(), tmp_path / "m.png", str(tmp_path / "m.png")]:
        assert torch.equal(check_masks(kind), expected)
    soft = check_masks(np.array([[0, 128], [255, 0]], np.uint8))
    torch.testing.assert_close(soft, torch.tensor([[[0, 128 / 255], [1, 0]]]))
    large = expected.repeat_interleave(5, 1).repeat_interleave(5, 2)
    torch.testing.assert_close(check_masks(large, 8), expected, atol=0.3, rtol=0)
    assert check_masks(large, 8).mean() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (np.zeros((64, 64)), "mask 0 is empty"),
        (np.full((64, 64), 2.0), "from 0 .keep. to 1"),
        (np.full((64, 64), np.nan), "from 0 .keep. to 1"),
        (np.full((64, 64), 300), "integers up to 255"),
        (np.ones((64, 32)), "the image is a square of 64"),
        (np.ones((1, 3, 64, 64)), "take one channel"),
        (ellipse((0.5, 0.5), (0.02, 0.02)), "vanishes on the latent grid of 16x16"),
        (np.ones((3, 64, 64)), "2 images and 3 masks"),
    ],
)
def test_masks_that_cannot_be_used(tiny, mask, problem):
    with pytest.raises(ValueError, match=problem):
        inpaint(tiny, HEALTHY, mask, "", steps=1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"image": HEALTHY[:, :, :, :48]}, "must be square"),
        ({"image": HEALTHY[:, :, :40, :40]}, "multiple of 16"),
        ({"strength": 1.5}, "strength must be 0 to 1, got 1.5"),
        ({"strength": "1"}, "strength must be a number"),
        ({"mask_blur": -1}, "mask_blur must be at least 0, got -1"),
        ({"content": "blank"}, "original, fill, noise, zeros"),
        ({"prompt": "<none>"}, "unknown token <none>"),
        ({"n": 0}, "n must be at least 1"),
    ],
)
def test_wrong_input(tiny, options, problem):
    given = {"image": HEALTHY, "mask": MASK, "prompt": "", "steps": 1, **options}
    with pytest.raises(ValueError, match=problem):
        inpaint(tiny, **given)


def test_fill_takes_the_colours_of_the_surroundings():
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, 0, :, :32] = 200  # red on the left, blue on the right, a green spot to be covered
    image[:, 2, :, 32:] = 100
    image[:, :, 28:36, 8:16] = torch.tensor([0, 255, 0], dtype=torch.uint8)[None, :, None, None]
    mask = check_masks(ellipse((0.19, 0.5), (0.1, 0.1)), 64)
    filled = fill_masked(image, mask)
    assert filled[0, 1].max() == 0 and filled[0, 0, 32, 12] > 150 and filled[0, 2, 32, 12] < 30
    assert torch.equal(filled[:, :, mask[0] == 0], image[:, :, mask[0] == 0])
    assert fill_masked(image, torch.ones(1, 64, 64)).float().std() < 1  # nothing to go by


# ---- the rule -----------------------------------------------------------------------------------


def test_the_paper_s_steps():
    assert 100 - start_step(100, 0.75) == 76  # A1111: t_enc + 1
    assert start_step(25, 1) == 25 - 24 - 1 and start_step(25, 0) == 24


@pytest.mark.parametrize("content", ["original", "noise"])
def test_every_step_equals_a_slow_reference_of_the_formulas(tiny, content):
    """Each step from the library's state before it: all in double precision but the U-Net."""
    steps, strength, scale, seed = 6, 0.75, 2.5, 11
    seen = []
    prompt = "<mine>:0.7 AND <other>:-0.4"
    options = {"steps": steps, "strength": strength, "cfg_scale": scale, "seed": seed}
    options |= {"embeddings": [MINE, OTHER], "content": content}
    image = HEALTHY[:1]
    inpaint(tiny, image, MASK, prompt, callback=lambda s: seen.append(s["x"]), **options)

    def sigma_of(t):
        logs = [0.5 * math.log((1 - float(a)) / float(a)) for a in tiny.alphas_cumprod.double()]
        low = int(t)
        return math.exp(logs[low] + (t - low) * (logs[min(low + 1, 999)] - logs[low]))

    times = [999 - 999 * i / (steps - 1) for i in range(steps)]
    sigmas = [*map(sigma_of, times), 0.0]
    first = steps - int(strength * steps) - 1
    m = latent_masks(blur_masks(check_masks(MASK, 64), 4.0), (16, 16)).double()
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn((1, *tiny.latent_shape()[:]), generator=generator).double()

    mean, std = tiny.encode_posterior(image)
    z0 = mean.double() + std.double() * draw()
    start = draw()
    if content == "noise":
        z0 = torch.where(m == 1, draw(), z0)
    x = z0 + sigmas[first] * start
    texts = [tiny.text(t, embeddings=[MINE, OTHER]) for t in ("<mine>", "<other>", "")]
    assert len(seen) == steps - first == 5
    for i, theirs in enumerate(seen, start=first):
        s, s_next = sigmas[i], sigmas[i + 1]
        predictions = []
        with torch.no_grad():
            for text in texts:
                scaled = (x / math.sqrt(s * s + 1)).float()
                eps = tiny.predict_noise(scaled, torch.tensor([times[i]]), text).double()
                predictions.append(x - s * eps)
        d_mine, d_other, d_u = predictions
        guided = d_u + 0.7 * scale * (d_mine - d_u) - 0.4 * scale * (d_other - d_u)
        denoised = z0 * (1 - m) + m * guided
        up = min(s_next, math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
        x = x + (x - denoised) / s * (math.sqrt(s_next**2 - up**2) - s)
        if s_next > 0:
            x = x + up * draw()
        # float32 rounding in the U-Net is multiplied by sigma
        torch.testing.assert_close(theirs.double(), x, rtol=0, atol=1e-5 * max(1, s))
        x = theirs.double()


def test_pixels_outside_are_bit_identical_and_inside_they_change(tiny):
    made = inpaint(tiny, HEALTHY, MASK, "<other>", embeddings=[OTHER], steps=6, n=2)
    assert made.shape == (4, 3, 64, 64) and made.dtype == torch.uint8
    share = blur_masks(check_masks(MASK, 64), 4.0)[0]
    outside, inside = share == 0, check_masks(MASK, 64)[0] > 0.9
    assert outside.sum() > 2000 and inside.sum() > 200
    for k, image in enumerate(HEALTHY.repeat_interleave(2, 0)):
        assert torch.equal(made[k][:, outside], image[:, outside])
        assert (made[k][:, inside].int() - image[:, inside].int()).abs().float().mean() > 5
    assert gray_levels(made[0], made[1]) > 5  # another seed


def test_an_image_depends_on_its_seed_alone(tiny):
    options = {"embeddings": [OTHER], "steps": 4}
    both = inpaint(tiny, HEALTHY, MASK, "<other>", n=2, seed=3, **options)
    again = inpaint(tiny, HEALTHY, MASK, "<other>", n=2, seed=3, batch_size=3, **options)
    assert gray_levels(both, again) <= 1
    alone = inpaint(tiny, HEALTHY[1], MASK, "<other>", seed=5, **options)
    assert gray_levels(alone[0], both[2]) <= 1


def test_several_masks_on_one_image(tiny):
    masks = torch.stack([ellipse((0.3, 0.5), (0.1, 0.1)), ellipse((0.7, 0.5), (0.1, 0.1))])
    made = inpaint(tiny, HEALTHY[0], masks, "<other>", embeddings=[OTHER], steps=4)
    changed = (made != HEALTHY[0]).any(1)
    assert changed[0, :, :32].any() and not changed[0, :, 32:].any()
    assert changed[1, :, 32:].any() and not changed[1, :, :32].any()


def test_a_full_mask_is_image_to_image_and_strength_decides_how_far(tiny):
    full = np.ones((64, 64), bool)
    far = {}
    for strength in (0.1, 0.9):
        made = inpaint(
            tiny, HEALTHY, full, "<other>", embeddings=[OTHER], strength=strength, steps=10
        )
        far[strength] = (made.int() - HEALTHY.int()).abs().float().mean()
    assert far[0.1] < 0.7 * far[0.9]


def test_content_decides_what_is_under_the_mask_at_the_start(tiny):
    options = {"strength": 0.1, "steps": 10}  # little noise: the start still shows at the end
    made = {}
    for content in ("original", "fill", "noise", "zeros"):
        made[content] = inpaint(tiny, HEALTHY[:1], MASK, "", content=content, **options)
    assert all(gray_levels(made["original"], made[c]) > 5 for c in ("fill", "noise", "zeros"))
    outside = blur_masks(check_masks(MASK, 64), 4.0)[0] == 0
    assert all(torch.equal(made[c][0][:, outside], HEALTHY[0][:, outside]) for c in made)


def test_a1111s_overlay_paints_a_larger_lesion_and_the_default_stays(tiny):
    options = {"embeddings": [OTHER], "steps": 4}
    plain, wide = (
        inpaint(tiny, HEALTHY[:1], MASK, "<other>", overlay=overlay, **options)
        for overlay in ("plain", "a1111")
    )
    assert torch.equal(plain, inpaint(tiny, HEALTHY[:1], MASK, "<other>", **options))
    areas = [int((image != HEALTHY[0]).any(0).sum()) for image in (plain[0], wide[0])]
    share = blur_masks(check_masks(MASK, 64), 4.0)[0]
    assert areas[0] <= areas[1] <= int((share > 0).sum())
    half = (share > 0.25) & (share < 0.5)  # twice the mask, twice the change
    away = [
        (image.int() - HEALTHY[0].int())[:, half].abs().float().mean()
        for image in (plain[0], wide[0])
    ]
    assert float(away[1]) == pytest.approx(2 * float(away[0]), rel=0.1)
    with pytest.raises(ValueError, match="unknown overlay 'x'; allowed are plain, a1111"):
        inpaint(tiny, HEALTHY, MASK, "", overlay="x")


def test_nan_under_the_mask_is_an_error(tiny):
    for parameter in (tiny.unet.conv_in.weight, tiny.vae.encoder.conv_in.weight):
        kept = parameter.data.clone()
        parameter.data.fill_(float("nan"))
        try:
            with pytest.raises(NotFiniteError, match="NaN or infinity"):
                inpaint(tiny, HEALTHY[:1], MASK, "red ground", steps=2)
        finally:
            parameter.data.copy_(kept)


def test_masks_in_a_palette_or_in_alpha(tmp_path):
    shape = check_masks(MASK, 64)[0].numpy() > 0.5
    file = tmp_path / "m.png"

    def read(image):
        image.save(file)
        return read_mask(file).numpy() > 0.5

    labels = Image.fromarray(shape.astype(np.uint8), "P")
    labels.putpalette([0, 0, 0, 128, 0, 0])  # red, as annotation programs write label 1
    assert (read(labels) == shape).all()
    assert (read(Image.fromarray(shape.astype(np.uint8))) == shape).all()  # 0 and 1
    for colour in (0, 255):  # a shape painted on transparency
        pixels = np.full((64, 64, 4), colour, np.uint8)
        pixels[..., 3] = shape * 255
        assert (read(Image.fromarray(pixels)) == shape).all()
    three = np.where(shape[..., None], [0, 9, 0], 0).astype(np.uint8)
    three[:9] = [9, 0, 0]
    two = np.full((64, 64, 4), 255, np.uint8)  # white and black on transparency
    two[..., :3], two[9:, :, 3] = shape[..., None] * 255, 0
    two[40:] = [255, 255, 255, 255]
    for wrong in (
        three, two, (shape * 2).astype(np.uint8), HEALTHY[0, 0].numpy() // 2 + 60,
        shape.astype(np.uint16) * 65535,
    ):  # fmt: skip
        with pytest.raises(ImageError, match="is no mask"):
            read(Image.fromarray(wrong))


def test_an_ellipse_takes_one_radius_and_no_pixels():
    assert torch.equal(ellipse((0.5, 0.5), 0.1), ellipse((0.5, 0.5), (0.1, 0.1)))
    with pytest.raises(ValueError, match="fractions of the edge, not in pixels"):
        ellipse((30, 30), (5, 5))


def test_seam_ratio_is_one_on_noise_and_high_on_a_pasted_disc():
    noise = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    images = torch.from_numpy(noise)
    assert seam_ratio(images, MASK).mean() == pytest.approx(1, abs=0.1)
    pasted = torch.where(check_masks(MASK, 64)[0] > 0.5, 255, images // 8).byte()
    assert (seam_ratio(pasted, MASK) > 2).all()
    with pytest.raises(ValueError, match="no border"):
        seam_ratio(images, np.ones((64, 64)))


def test_find_tumours_finds_most_of_the_phantoms_own():
    drawn = make_phantoms("prostate", "tumour", 40, split="test")
    found = find_tumours(drawn.images)
    seen = (found & drawn.masks).sum((1, 2)) > 0.3 * drawn.masks.sum((1, 2))
    assert seen.float().mean() > 0.6
    assert (found & ~drawn.masks).float().mean() < 0.01
    none = make_phantoms("prostate", "healthy", 40, split="test").images
    assert (find_tumours(none).float().mean((1, 2)) > 0.0015).float().mean() < 0.2


def test_png_masks_of_pillow(tmp_path):
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "m.png")  # 1 bit
    assert torch.equal(check_masks(tmp_path / "m.png")[0], torch.eye(8))
