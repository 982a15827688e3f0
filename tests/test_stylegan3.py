"""StyleGAN3 against known counts, hand-made numbers and its own promise: equivariance."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medbudget import make_phantoms
from medbudget.stylegan3 import (
    TINY,
    Architecture,
    Discriminator,
    GanError,
    Generator,
    StyleGAN3,
    StyleGAN3Settings,
    make_stylegan3,
    train_stylegan3,
    training,
    translation_equivariance,
)
from medbudget.stylegan3.augment import _shift, adapt, augment
from medbudget.stylegan3.filters import (
    design_filter,
    downsample,
    make_rates,
    upsample,
)
from medbudget.stylegan3.losses import (
    discriminator_loss,
    generator_loss,
    make_optimizers,
    r1_penalty,
    update_ema,
)
from medbudget.stylegan3.model import draw_latents
from medbudget.stylegan3.networks import SynthesisLayer, minibatch_std
from medbudget.stylegan3.training import Trainer

SMALL = Architecture(
    size=32, channel_base=256, channel_max=8, width=8, n_layers=3, margin=4, mbstd_group=2
)
QUICK = StyleGAN3Settings.preset("tiny", kimg=0.048, batch_size=4, snapshot_kimg=0.012)


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_512_t_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        generator, discriminator = Generator(Architecture(512)), Discriminator(Architecture(512))
    assert round(count(generator) / 1e6, 2) == 24.87
    assert round(count(generator.mapping) / 1e6, 2) == 0.53
    assert round(count(discriminator) / 1e6, 2) == 28.98
    assert len(generator.layers) == 14


def test_rates_of_the_papers_figure_4():
    rates = make_rates(1024, 14)
    assert [r.rate for r in rates[:3]] == [16, 16, 32] and rates[-1].rate == 1024
    assert rates[0].cutoff == 2 and rates[12].cutoff == rates[14].cutoff == 512
    assert rates[0].cutoff + rates[0].half_width == 8  # raised to half the rate
    assert rates[12].cutoff + rates[12].half_width == pytest.approx(512 * 2**0.3)
    cutoffs = [r.cutoff for r in rates[:13]]
    steps = np.divide(cutoffs[1:], cutoffs[:-1])
    assert np.allclose(steps, steps[0])
    assert all(r.cutoff <= r.rate / 2 for r in rates), "what a layer holds fits its rate"
    canvases = [layer.canvas for layer in _meta(Architecture(512)).layers]
    assert canvases[0] == 36 and canvases[-1] == 532


def _meta(architecture):
    with torch.device("meta"):
        return Generator(architecture)


def attenuation(taps, half_width, rate):
    """Kaiser's estimate of the stop band's attenuation in dB: equation of appendix C."""
    return 2.285 * (taps - 1) * math.pi * (2 * half_width / (rate / 2)) + 7.95


def test_filter_is_the_kaiser_windowed_sinc_of_the_appendix():
    taps, cutoff, half_width, rate = 12, 6.0, 4.0, 64
    t = (np.arange(taps) - (taps - 1) / 2) / rate
    damping = attenuation(taps, half_width, rate)
    assert 21 < damping < 50
    beta = 0.5842 * (damping - 21) ** 0.4 + 0.07886 * (damping - 21)
    window = np.i0(beta * np.sqrt(1 - (2 * t * rate / (taps - 1)) ** 2)) / np.i0(beta)
    ideal = np.sinc(2 * cutoff * t) * window
    made = design_filter(taps, cutoff, half_width, rate).numpy()
    assert np.allclose(made, ideal / ideal.sum(), atol=1e-6)


def response(kernel, rate, frequency):
    """Gain at a frequency, by the definition of the Fourier transform."""
    t = (torch.arange(len(kernel)) - (len(kernel) - 1) / 2) / rate
    return float((kernel * torch.cos(2 * math.pi * frequency * t)).sum())


def test_filters_of_512_t_pass_below_and_stop_above():
    for r in make_rates(512):
        rate, taps = 2 * r.rate, 12
        kernel = design_filter(taps, r.cutoff, r.half_width, rate)
        assert response(kernel, rate, 0) == pytest.approx(1, abs=1e-5)
        if r.half_width < r.cutoff:  # else the transition begins below zero
            assert response(kernel, rate, r.cutoff) == pytest.approx(0.5, abs=0.05), "half way"
        stop = np.linspace(r.cutoff + r.half_width, rate / 2, 50)
        worst = max(abs(response(kernel, rate, f)) for f in stop)
        assert -20 * math.log10(worst) > attenuation(taps, r.half_width, rate) - 6


def wave(n, rate, cycles, phase=0.3):
    x = (torch.arange(n) - (n - 1) / 2) / rate
    return torch.sin(2 * math.pi * (cycles * x + phase))


@pytest.mark.parametrize("factor", [2, 4])
def test_resampling_shifts_nothing_and_keeps_what_is_below_the_cutoff(factor):
    rate, n = 16, 36
    slow = wave(n, rate, 1.5)
    kernel = design_filter(6 * factor, 8, 6, rate * factor)
    fine = upsample(slow.view(1, 1, 1, n).expand(1, 1, n, n), kernel, factor, n * factor)
    wanted = wave(n * factor, rate * factor, 1.5)
    middle = slice(6 * factor, -6 * factor)
    assert (fine[0, 0, 40][middle] - wanted[middle]).abs().max() < 0.03
    back = downsample(F.pad(fine, [5 * factor // 2 + 0] * 4), kernel, factor)
    edge = (back.shape[3] - n) // 2
    assert (back[0, 0, 15, edge : edge + n][8:-8] - slow[8:-8]).abs().max() < 0.06


@pytest.fixture(scope="module")
def untrained():
    return make_stylegan3(TINY).generator


def test_an_untrained_generator_is_as_equivariant_as_the_paper_reports(untrained):
    assert translation_equivariance(untrained) > 58
    assert translation_equivariance(StyleGAN3.load().generator) > 40, "the one that ships"


def test_equivariance_breaks_with_the_filters(untrained):
    broken = make_stylegan3(TINY).generator
    for layer in broken.layers:
        for name, width in (("up_filter", layer.up), ("down_filter", 1)):
            kernel = torch.zeros_like(getattr(layer, name))
            first = len(kernel) // 2 - width // 2
            kernel[first : first + width] = 1 / width  # repeat pixels, and pick every second one
            setattr(layer, name, kernel)
    assert translation_equivariance(broken) < translation_equivariance(untrained) - 30


def test_a_shift_of_the_input_moves_the_image_to_the_right_and_down(untrained):
    w = untrained.mapping(draw_latents([0], TINY.width))
    with torch.no_grad():
        plain = untrained.synthesize(w)
        moved = untrained.synthesize(w, shift=torch.tensor([[4 / 64, 2 / 64]]))
    assert torch.allclose(moved[:, :, 2:, 4:], plain[:, :, :-2, :-4], atol=0.02)


def test_modulation_is_that_of_scaled_and_normalised_weights(untrained):
    layer = untrained.layers[0]
    x, w = torch.randn(2, 64, 36, 36), torch.randn(2, TINY.width)
    wanted = []
    for one, style in zip(x, layer.affine(w)):
        weight = layer.weight * style[None, :, None, None]
        weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        y = F.conv2d(one[None], weight, layer.bias, padding=1)
        y = upsample(y, layer.up_filter, layer.up, (layer.canvas - 1) * 2 + 12)
        y = F.leaky_relu(y, 0.2) * math.sqrt(2)
        wanted.append(downsample(y, layer.down_filter, layer.down))
    assert torch.allclose(layer(x, w), torch.cat(wanted), atol=1e-4)


def test_magnitudes_take_the_inputs_scale_out():
    rates = make_rates(64, 6)
    torch.manual_seed(0)
    layer = SynthesisLayer(8, 4, 4, 4, rates[0], rates[0])
    x, w = torch.randn(2, 4, 24, 24), torch.randn(2, 8)
    with torch.no_grad():
        plain = layer.eval()(x, w)
        layer.magnitude.fill_(100.0)
        assert torch.allclose(layer(10 * x, w), plain, atol=1e-4)
        layer.train().magnitude_images = 2.0  # half-life: one batch of two
        layer(10 * x, w)
    assert float(layer.magnitude) == pytest.approx(50 + 50 * float(x.square().mean()), rel=1e-4)


def test_minibatch_std_by_hand_and_why_a_group_of_one_says_nothing():
    x = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 2.0)])
    assert torch.allclose(minibatch_std(x, 2)[:, 3], torch.ones(2, 4, 4))
    alone = minibatch_std(x, 1)[:, 3]
    assert float(alone.max()) == float(alone.min()) < 1e-3, "the same for any images"


# --------------------------------------------------------------------------------- losses


def test_losses_by_hand():
    zero = torch.zeros(4)
    assert float(generator_loss(zero)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    assert generator_loss(zero + 1) < generator_loss(zero) < generator_loss(zero - 1)
    assert discriminator_loss(zero + 1, zero - 1) < discriminator_loss(zero, zero)


def test_r1_by_hand_with_its_gradient():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([1.0, 2.0, 2.0]).view(3, 1, 1))

        def forward(self, x):
            return (self.a * x).sum((1, 2, 3))

    network = Linear()
    penalty = r1_penalty(network, torch.randn(5, 3, 1, 1), gamma=4.0)
    assert penalty.item() == pytest.approx(4 / 2 * (1 + 4 + 4))
    penalty.backward()
    assert torch.allclose(network.a.grad, 4 * network.a)


def test_r1_of_the_discriminator_against_finite_differences():
    network = make_stylegan3(SMALL).discriminator.double()
    network.architecture = replace(SMALL, mbstd_group=1)
    x, directions = (
        torch.randn(n, 3, 32, 32, dtype=torch.double, generator=seeded()) for n in (1, 40)
    )
    penalty = r1_penalty(network, x, 2.0).item()
    step = 1e-7  # so short that next to no leaky ReLU bends on the way
    with torch.no_grad():
        slopes = (network(x + step * directions) - network(x - step * directions)) / (2 * step)
    (gradient,) = torch.autograd.grad(network(y := x.clone().requires_grad_()).sum(), y)
    assert penalty == pytest.approx(float(gradient.square().sum()))
    error = slopes - (directions * gradient).sum((1, 2, 3))
    assert error.norm() < 1e-3 * slopes.norm()


def test_ema_by_hand():
    average, network = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        for p in average.parameters():
            p.fill_(1.0)
        for p in network.parameters():
            p.fill_(5.0)
    update_ema(average, network, 0.75)
    assert float(average.weight) == 2 and float(average.bias) == 2
    assert float(network.weight) == 5


def test_lazy_regularisation_slows_the_discriminators_adam():
    model = make_stylegan3(SMALL)
    s = StyleGAN3Settings()
    lr = (s.lr_generator, s.lr_discriminator)
    g, d = make_optimizers(model.generator, model.discriminator, lr, s.r1_every)
    assert g.defaults["lr"] == 0.0025 and g.defaults["betas"] == (0, 0.99)
    assert d.defaults["lr"] == pytest.approx(0.002 * 16 / 17)
    assert d.defaults["betas"][1] == pytest.approx(0.99 ** (16 / 17))


def test_paper_preset_is_the_papers_command():
    s = StyleGAN3Settings.preset("paper")
    assert (s.batch_size, s.gamma, s.kimg, s.mirror, s.mbstd_group) == (4, 8, 100, True, 1)
    assert s.kimg * 1000 / s.batch_size == 25_000
    assert (s.ema_kimg, s.ada_target, s.ada_every, s.ada_kimg) == (1.25, 0.6, 4, 100)
    with pytest.raises(ValueError, match="allowed are tiny, "):
        StyleGAN3Settings.preset("best")
    with pytest.raises(ValueError, match="kimg must be at least"):
        StyleGAN3Settings(kimg=0)
    with pytest.raises(ValueError, match="power of two"):
        Architecture(size=96)


# --------------------------------------------------------------------------- augmentation


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_augmentation_differs_by_image_and_repeats_by_seed():
    x = torch.rand(1, 3, 16, 16).expand(8, -1, -1, -1)
    made = augment(x, 1.0, seeded())
    assert torch.equal(made, augment(x, 1.0, seeded()))
    assert len({tuple(image.flatten().tolist()) for image in made}) == 8
    assert augment(x, 0.0, seeded()) is x


def test_geometry_keeps_a_flat_image_and_colour_keeps_it_flat():
    x = torch.full((16, 3, 16, 16), 0.4)
    assert torch.allclose(augment(x, 1.0, seeded(), colour=False), x, atol=1e-6)
    coloured = augment(x, 1.0, seeded())
    assert float(coloured.var((2, 3)).max()) < 1e-9
    assert float(coloured[:, 0, 0, 0].std()) > 0.1
    assert torch.allclose(coloured[:, 0], coloured[:, 1], atol=1e-6), "gray stays gray"


def test_shifts_are_of_whole_pixels_and_move_the_image(monkeypatch):
    from medbudget.stylegan3 import augment as module

    identity = torch.cat([torch.eye(2), torch.zeros(2, 1)], 1)
    monkeypatch.setattr(module, "_affine", lambda n, p, g: identity.repeat(n, 1, 1))
    shift = _shift(8, 1.0, 16, seeded()) * 8
    assert torch.allclose(shift, shift.round()) and float(shift.abs().max()) <= 2
    monkeypatch.setattr(module, "_shift", lambda n, p, size, g: torch.tensor([[2 / 16 * 2, 0.0]]))
    x = torch.rand(1, 3, 16, 16)
    moved = augment(x, 1.0, seeded(), colour=False)
    assert torch.allclose(moved[..., :-2], x[..., 2:], atol=1e-5)


def test_probability_follows_overfitting():
    up = adapt(0.5, 0.9, 16, target=0.6, images_to_one=1000)
    assert up == pytest.approx(0.516)
    assert adapt(0.5, 0.2, 16, target=0.6, images_to_one=1000) == pytest.approx(0.484)
    assert adapt(0.0, 0.2, 16, target=0.6, images_to_one=1000) == 0
    assert adapt(0.999, 0.9, 16, target=0.6, images_to_one=1000) == 1


# ------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def cases():
    return make_phantoms("prostate", "healthy", 6, size=32).images


def test_a_resumed_run_ends_with_the_same_bits(cases, tmp_path):
    start = make_stylegan3(SMALL)
    whole = train_stylegan3(cases, QUICK, start=start)

    class Stop(Exception):
        pass

    def stop(state):
        if state["step"] == 7:
            raise Stop

    path = tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        train_stylegan3(cases, QUICK, start=start, checkpoint=path, callback=stop)
    steps = []
    resumed = train_stylegan3(
        cases, QUICK, start=start, checkpoint=path, callback=lambda s: steps.append(s["step"])
    )
    assert steps == list(range(7, 13)), "goes on from the checkpoint at step 6"
    for name in ("generator", "discriminator"):
        a, b = (getattr(m, name).state_dict() for m in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    histories = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in m.record["history"]]
        for m in (whole, resumed)
    ]
    assert histories[0] == histories[1] and histories[0][-1]["images"] == 48
    assert resumed.record["images_seen"] == 48
    with pytest.raises(ValueError, match=r"another run: gamma \(0.2 there, 1 now\) differ"):
        train_stylegan3(cases, replace(QUICK, gamma=1), start=start, checkpoint=path)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        train_stylegan3(cases, QUICK, start=start, checkpoint=path)


def test_the_discriminator_learns_to_tell_and_the_generator_answers(cases):
    settings = replace(QUICK, kimg=0.16, ada_target=0, ema_kimg=0.01, snapshot_kimg=0.16,
                       lr_generator=0.01, lr_discriminator=0.01)  # fmt: skip
    start = make_stylegan3(SMALL)
    made = train_stylegan3(cases, settings, start=start)
    real = cases.float() / 127.5 - 1
    fake = start.generator(draw_latents(range(6), SMALL.width))
    with torch.no_grad():
        before = start.discriminator(real).mean() - start.discriminator(fake).mean()
        after = made.discriminator(real).mean() - made.discriminator(fake).mean()
    assert after > before + 0.5
    distance = [(m.sample(32).float().mean((0, 2, 3)) - cases.float().mean((0, 2, 3))).abs().mean()
                for m in (start, made)]  # fmt: skip
    assert distance[1] < distance[0], "the colours of the images come nearer"


def test_what_cannot_be_trained_on_is_refused(cases, monkeypatch):
    with pytest.raises(ValueError, match="must be 64x64 for these networks"):
        train_stylegan3(cases, QUICK, start=make_stylegan3(TINY))
    monkeypatch.setattr(training, "generator_loss", lambda logits: logits.sum() * float("nan"))
    with pytest.raises(GanError, match="no longer finite"):
        train_stylegan3(cases, QUICK, start=make_stylegan3(SMALL))


def test_an_image_depends_on_its_seed_alone():
    model = make_stylegan3(SMALL)
    many = model.sample(5, seed=10, batch_size=2)
    one = model.sample(1, seed=13)
    assert (many[3].int() - one[0].int()).abs().max() <= 1
    assert not torch.equal(many[0], many[1])
    wide, narrow = (model.sample(16, truncation=t).float().std(0).mean() for t in (1, 0.3))
    assert narrow < 0.6 * wide, "truncation draws images together"


def test_seeds_beyond_pytorchs_are_refused_as_sample_does(cases):
    model = make_stylegan3(SMALL)
    for call in (
        lambda: model.sample(2, seed=2**64 - 1),
        lambda: make_stylegan3(SMALL, seed=2**64),
        lambda: translation_equivariance(model.generator, seed=2**64),
        lambda: StyleGAN3Settings(seed=-(2**63) - 1),
    ):
        with pytest.raises(ValueError, match="seed must be -9223372036854775808 to"):
            call()
    assert model.sample(1, seed=2**64 - 1).shape == (1, 3, 32, 32)
    train_stylegan3(cases, replace(QUICK, kimg=0.004, seed=2**64 - 1), start=model)


def test_what_is_saved_is_loaded_and_other_files_are_refused(tmp_path):
    model = make_stylegan3(SMALL, replace(SMALL, channel_max=16))
    model.save(tmp_path / "m.safetensors")
    loaded = StyleGAN3.load(tmp_path / "m.safetensors")
    assert loaded.record == model.record
    assert loaded.discriminator.architecture.channel_max == 16
    assert (loaded.sample(2).int() - model.sample(2).int()).abs().max() <= 3
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no StyleGAN3"):
        StyleGAN3.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        StyleGAN3.load(tmp_path / "absent.safetensors")


# --------------------------------------------------------------------------------- memory


def test_the_papers_training_takes_less_than_8_gb_at_512_px():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from stylegan3 import count_memory

    assert 3.5 < count_memory(512, 2) / 2**30 < 3.7, "in parts: the same at any batch"


def test_a_batch_in_parts_and_recomputed_layers_learn_the_same(cases, monkeypatch):
    def train():
        settings = replace(QUICK, ada_target=0, mbstd_group=1, kimg=0.016)
        trainer = Trainer(cases, make_stylegan3(SMALL), settings, "cpu")
        for layer in (*trainer.generator.layers, trainer.generator.to_rgb):
            layer.recompute = len(trainer.parts) > 1
        history = [trainer.iterate() for _ in range(4)]
        return trainer, history

    whole, losses = train()
    monkeypatch.setattr(training, "images_at_once", lambda size: 3)
    parts, others = train()
    assert [len(part) for part in parts.parts] == [3, 1] and len(whole.parts) == 1
    for mine, theirs in zip(losses, others):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3)
    for a, b in zip(whole.generator.parameters(), parts.generator.parameters()):
        assert torch.allclose(a, b, atol=1e-3)


def test_layers_that_are_computed_again_give_the_same_bits():
    z, grads, magnitudes = torch.randn(2, SMALL.width, generator=seeded()), [], []
    for again in (False, True):
        generator = make_stylegan3(SMALL).generator.train()
        for layer in (*generator.layers, generator.to_rgb):
            layer.recompute = again
        generator(z).square().sum().backward()
        grads.append([p.grad for p in generator.parameters()])
        magnitudes.append([layer.magnitude for layer in generator.layers])
    assert all(map(torch.equal, *grads)) and all(map(torch.equal, *magnitudes))
