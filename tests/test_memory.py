"""Memory is counted before a run, and a run that is short of it goes on; float16 is safe."""

import warnings
from dataclasses import replace

import pytest
import torch

from medbudget import InversionSettings, invert, load_base, make_phantoms, sample
from medbudget.inversion import InversionError, _prepare_step, compute_loss
from medbudget.memory import PeakMemory, largest_batch, plan_memory

IMAGES = make_phantoms("prostate", "tumour", 4).images
FEW = InversionSettings(n_vectors=4, steps=6, lr=0.01, batch_size=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def small():
    return load_base("small-random", device="cpu")


def networks(base):
    return base.vae, base.unet, base.text_encoder


def test_the_peak_of_a_chain_is_what_a_hand_counts():
    # a, b = 4 kB each; then a is freed before c: never more than two live at once
    with torch.device("meta"), PeakMemory() as counter:
        a = torch.empty(1000)
        b = a + 1
        del a
        c = b + 1
        del b
    assert (counter.peak, counter.now) == (8000, 4000)
    view = c.view(10, 100)
    with PeakMemory() as counter:
        kept = [view.t(), view[0]]  # views take nothing
    assert counter.peak == 0 and len(kept) == 2
    layer = torch.nn.Linear(10, 20, bias=False, device="meta")  # its weights are not activations
    with torch.device("meta"), torch.no_grad(), PeakMemory() as counter:
        layer(torch.empty(5, 10))
    assert counter.peak == 4 * (5 * 10 + 5 * 20)


def test_backward_keeps_what_the_forward_saved_and_checkpointing_does_not(small):
    options = {"networks": networks(small), "size": 64, "dtype": torch.float32}
    plain = plan_memory("invert", **options)
    spare = plan_memory("invert", checkpointing=True, **options)
    parameters = sum(p.numel() for m in networks(small)[1:] for p in m.parameters())
    assert plain.weights == 4 * parameters
    assert plan_memory("invert", **{**options, "dtype": torch.float16}).weights == 2 * parameters
    assert spare.activations < plain.activations
    with pytest.raises(ValueError, match="invert, sample"):
        plan_memory("train")


def test_the_largest_batch_fits_and_the_next_does_not(small):
    options = {"networks": networks(small), "size": 64, "dtype": torch.float32}
    for job in ("invert", "sample"):
        free = plan_memory(job, batch_size=24, **options).total
        found = largest_batch(job, free + 1e-6, **options)
        assert found == 24, job
        assert plan_memory(job, batch_size=25, **options).total > free
    assert largest_batch("sample", 0.1, **options) == 0


@pytest.mark.slow
def test_stable_diffusion_fits_the_cards_that_are_promised():
    assert plan_memory("invert").total < 8
    assert plan_memory("invert", checkpointing=True).total < 6
    assert plan_memory("sample").total < 5


def test_out_of_memory_in_training_turns_checkpointing_on_and_goes_on(tiny, monkeypatch, tmp_path):
    whole = invert(tiny, IMAGES, token="<x>", settings=FEW)
    predict, calls = type(tiny).predict_noise, []

    def short_of_memory(self, x, t, context):
        calls.append(self.unet.is_gradient_checkpointing)
        if len(calls) > 3 and not self.unet.is_gradient_checkpointing:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(self, x, t, context)

    monkeypatch.setattr(type(tiny), "predict_noise", short_of_memory)
    steps = []
    with pytest.warns(UserWarning, match="out of GPU memory at step 4: checkpointing is on"):
        made = invert(
            tiny, IMAGES, token="<x>", settings=FEW, checkpoint=tmp_path / "c.ckpt",
            callback=lambda state: steps.append(state["step"]),
        )  # fmt: skip
    assert calls == [False] * 4 + [True] * 3 and steps == [1, 2, 3, 4, 5, 6]
    assert not tiny.unet.is_gradient_checkpointing, "left on for the next run"
    torch.testing.assert_close(made.vectors, whole.vectors, rtol=0, atol=1e-5)

    def hopeless(self, x, t, context):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(tiny), "predict_noise", hopeless)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(InversionError, match=r"in spite of checkpointing.*batch_size \(2\)"),
    ):
        invert(tiny, IMAGES, token="<x>", settings=FEW)
    assert not tiny.unet.is_gradient_checkpointing


# --------------------------------------------------------------------------- float16


def test_attention_scores_beyond_float16_stay_finite():
    """SD 2's attention overflows in float16 unless the scores are kept in float32."""
    from diffusers.models.attention_processor import AttnProcessor

    base = load_base("small-random", device="cpu", dtype=torch.float16)
    with torch.no_grad():
        for name, p in base.unet.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                p.mul_(600)  # scores in the hundred thousands; float16 ends at 65504
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = base.text("a")
        ours = base.predict_noise(x, 10, context)
        base.unet.set_attn_processor(AttnProcessor())
        plain = base.predict_noise(x, 10, context)
    assert torch.isfinite(ours).all() and not torch.isfinite(plain).all()


def test_float16_trains_as_float32_does():
    words = {}
    for dtype in (torch.float32, torch.float16):
        base = load_base("small-random", device="cpu", dtype=dtype)
        seen = []
        settings = InversionSettings(n_vectors=4, steps=4, batch_size=1)
        words[dtype] = invert(
            base, IMAGES, token="<x>", settings=settings, callback=seen.append
        ), [s["loss"] for s in seen], [s["grad_norm"] for s in seen]  # fmt: skip
    (full, losses, norms), (half, half_losses, half_norms) = words.values()
    assert half_losses == pytest.approx(losses, rel=0.02)
    assert half_norms == pytest.approx(norms, rel=0.2) and min(half_norms) > 0
    assert half.vectors.dtype == torch.float32 and not torch.equal(half.vectors[:1], full.vectors)


def test_the_loss_scale_falls_at_an_overflow_comes_back_and_is_saved(monkeypatch, tmp_path):
    base = load_base("small-random", device="cpu", dtype=torch.float16)
    monkeypatch.setattr("medbudget.inversion.GROW_EVERY", 3)
    scales = []

    def prepare(base, vectors, inputs, weights):
        def compute(latents, t, noise, scale):
            scales.append(scale)
            gradient = torch.ones_like(vectors)
            return torch.tensor(1.0), gradient * (float("inf") if scale > 2**14 else 1.0)

        return compute

    monkeypatch.setattr("medbudget.inversion._prepare_step", prepare)
    settings = InversionSettings(n_vectors=4, steps=3, batch_size=1, checkpoint_every=100)
    path = tmp_path / "c.ckpt"
    invert(base, IMAGES, token="<x>", settings=settings, checkpoint=path)
    assert scales == [2.0**16, 2.0**15, 2.0**14, 2.0**14, 2.0**14]
    assert torch.load(path, weights_only=True)["scale"] == 2.0**14
    scales.clear()
    invert(base, IMAGES, token="<x>", settings=replace(settings, steps=5), checkpoint=path)
    assert scales == [2.0**15, 2.0**14, 2.0**14]  # tried again after GROW_EVERY steps


def test_a_gradient_that_underflows_is_an_error_not_a_silent_success(small, monkeypatch):
    def zero(base, vectors, inputs, weights):
        return lambda *inputs: (torch.tensor(1.0), torch.zeros_like(vectors))

    monkeypatch.setattr("medbudget.inversion._prepare_step", zero)
    with pytest.raises(InversionError, match="after 6 steps the vectors have not moved"):
        invert(small, IMAGES, token="<x>", settings=FEW)


# --------------------------------------------------------------------------- fast paths


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_host_so_that_a_cuda_graph_can_hold_it(small):
    vectors = torch.randn(4, small.width, requires_grad=True)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, 8, 8))
    compute = _prepare_step(small, vectors, inputs, torch.ones(1000))
    compute(*inputs, 1.0)  # fills the caches
    with Ops() as ops:
        compute(*inputs, torch.ones(()))
    assert "aten::convolution" in ops.names
    # item(), torch.tensor(…) and data-dependent shapes would break the recording
    for forbidden in ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select"):
        assert f"aten::{forbidden}" not in ops.names, forbidden


def train_both_ways(steps):
    settings = InversionSettings(n_vectors=4, steps=steps, batch_size=1)
    losses = {}
    for fast in (False, True):
        base = load_base("small-random", device="cpu", fast=fast)
        seen = []
        invert(
            base, IMAGES, token="<x>", settings=settings,
            callback=lambda state, seen=seen: seen.append(state["loss"]),
        )  # fmt: skip
        losses[fast] = torch.tensor(seen)
    return losses


def test_channels_last_gives_the_same_losses_over_100_steps(monkeypatch):
    monkeypatch.setattr("medbudget.loading.shutil.which", lambda name: None)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        losses = train_both_ways(100)
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_gives_the_same_losses_over_100_steps():
    import os
    import shutil

    if not os.environ.get("MEDBUDGET_FULL_SIZE"):
        pytest.skip("compiles for minutes: set MEDBUDGET_FULL_SIZE=1")
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    losses = train_both_ways(100)
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-4)


def test_a_fast_base_draws_the_same_images(monkeypatch):
    monkeypatch.setattr("medbudget.loading.shutil.which", lambda name: None)
    with pytest.warns(UserWarning, match="compiler"):
        fast = load_base("small-random", device="cpu", fast=True)
    slow = load_base("small-random", device="cpu")
    assert fast.fast and not slow.fast and fast.hash == slow.hash
    a, b = (sample(base, "a", n=2, steps=3).int() for base in (fast, slow))
    assert int((a - b).abs().max()) <= 1


def test_the_noised_latents_use_the_schedule_on_the_device(small):
    z, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0, 999])
    vectors = torch.randn(4, small.width)
    with torch.no_grad():
        whole = compute_loss(small, vectors, z, t, noise)
        parts = [
            compute_loss(small, vectors, z[i : i + 1], t[i : i + 1], noise[i : i + 1])
            for i in range(2)
        ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=1e-5)
