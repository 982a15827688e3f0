import signal
import warnings
from dataclasses import replace

import pytest
import torch

from medbudget import (
    Embedding,
    InversionSettings,
    invert,
    load_base,
    make_phantoms,
    sample,
)
from medbudget.loading import hash_weights
from medbudget.runs import load_checkpoint
from medbudget.training.inversion import (
    compare_noise,
    make_init,
    min_snr_weights,
)
from medbudget.training.loop import InversionError, Run

IMAGES = make_phantoms("prostate", "tumour", 6).images
FEW = InversionSettings.preset(
    "paper", n_vectors=4, steps=6, lr=0.01, batch_size=2, checkpoint_every=2
)


def run(tiny, settings=FEW, **kwargs):
    return invert(tiny, IMAGES, token="<x>", settings=settings, **kwargs)


def test_paper_preset_is_the_papers():
    paper = InversionSettings.preset("paper")
    assert (paper.lr, paper.steps, paper.batch_size, paper.n_vectors) == (0.005, 50_000, 1, 64)
    assert (paper.schedule, paper.loss, paper.init, paper.latents) == (
        "constant", "plain", "*", "once",
    )  # fmt: skip
    assert InversionSettings.preset("paper", steps=5, lr=None).steps == 5
    with pytest.raises(ValueError, match="tiny, colab, paper"):
        InversionSettings.preset("huge")
    with pytest.raises(ValueError, match="unknown settings stepz"):
        InversionSettings.preset("tiny", stepz=1)


def test_only_the_vectors_are_trained(tiny):
    modules = (tiny.vae, tiny.unet, tiny.text_encoder)
    assert hash_weights(*modules) == tiny.hash
    e = run(tiny)
    assert hash_weights(*modules) == tiny.hash
    for module in modules:
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert e.vectors.shape == (4, 96) and e.step == 6 and e.base_hash == tiny.hash
    assert not torch.equal(e.vectors, make_init(tiny, FEW))


def test_one_step_is_adamws_first(tiny):
    # Adam's first step moves every coordinate by lr * g / (|g| + eps), whatever the gradient
    norms = []
    moved = run(
        tiny, replace(FEW, steps=1), callback=lambda s: norms.append(s["grad_norm"])
    ).vectors
    moved = moved - make_init(tiny, FEW)
    assert norms[0] > 0
    assert moved.abs().max() <= 0.01 * 1.0001 and moved.abs().median() > 0.0099


def test_the_loss_equals_its_equation(tiny):
    torch.manual_seed(0)
    z, noise = torch.randn(2, 3, 8, 16, 16)
    t, vectors = torch.tensor([10, 500, 990]), torch.randn(4, 96)
    weights = min_snr_weights(tiny.alphas_cumprod)
    errors = []
    context = tiny.text(vectors)
    for i in range(3):
        a = tiny.alphas_cumprod[t[i]]
        noisy = a.sqrt() * z[i] + (1 - a).sqrt() * noise[i]
        eps = tiny.unet(noisy[None], t[i], encoder_hidden_states=context).sample
        errors.append(((eps - noise[i]) ** 2).mean())
    plain = compare_noise(tiny, tiny.text(vectors), z, t, noise)
    torch.testing.assert_close(plain, torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
    weighted = compare_noise(tiny, tiny.text(vectors), z, t, noise, weights)
    torch.testing.assert_close(
        weighted, (torch.stack(errors) * weights[t]).mean(), rtol=1e-4, atol=1e-6
    )


def test_min_snr_weights_rise_with_the_noise(tiny):
    w = min_snr_weights(tiny.alphas_cumprod)
    assert abs(float(w.mean()) - 1) < 1e-5
    assert (w.diff() >= -1e-5).all() and w[-1] > 5 * w[100]


def test_training_lowers_the_loss_on_its_images(tiny):
    e = run(tiny, replace(FEW, steps=12, lr=0.1))
    z = tiny.encode(IMAGES)
    t = torch.full((6,), 700)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before = compare_noise(tiny, tiny.text(make_init(tiny, FEW)), z, t, noise)
        after = compare_noise(tiny, tiny.text(e.vectors), z, t, noise)
    assert after < before


def test_the_vectors_stand_between_bos_and_eos(tiny):
    vectors = torch.randn(3, 96)
    seen = {}
    table = tiny.text_encoder.get_input_embeddings()
    handle = tiny.text_encoder.embeddings.register_forward_hook(
        lambda m, i, o: seen.update(rows=o.detach())
    )
    tiny.text(vectors)
    handle.remove()
    rows = seen["rows"][0] - tiny.text_encoder.embeddings.position_embedding.weight
    tok = tiny.tokenizer
    torch.testing.assert_close(rows[0], table.weight[tok.bos_token_id])
    torch.testing.assert_close(rows[1:4], vectors)
    torch.testing.assert_close(rows[4], table.weight[tok.eos_token_id])
    assert torch.allclose(rows[5:], table.weight[tok.pad_token_id], atol=1e-6)


def test_prompt_with_the_token_equals_the_bare_vectors(tiny):
    vectors = torch.randn(64, 96)
    with torch.no_grad():
        bare = tiny.text(vectors)
        prompt = tiny.text("<x>", embeddings=[Embedding(vectors, "<x>")])
    assert torch.equal(bare, prompt)


def test_init(tiny):
    star = make_init(tiny, FEW)
    assert all(torch.equal(row, tiny.token_rows("*")[0]) for row in star)
    two = make_init(tiny, replace(FEW, init="red box"))
    red, box = tiny.token_rows("red box")
    assert torch.equal(two, torch.stack([red, red, box, box]))
    mean = make_init(tiny, replace(FEW, init="mean"))
    assert (mean.std(0) > 0).all()


def test_latent_policies_differ(tiny):
    found = [
        run(tiny, replace(FEW, steps=3, latents=p)).vectors for p in ("once", "mean", "resample")
    ]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(found[0], run(tiny, replace(FEW, steps=3)).vectors)


def test_interrupted_and_resumed_gives_the_same_bytes(tiny, tmp_path):
    whole = run(tiny)

    def stop(state):
        if state["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        run(tiny, checkpoint=path, callback=stop)
    steps = []
    resumed = run(tiny, checkpoint=path, callback=lambda s: steps.append(s["step"]))
    assert steps == [4, 5, 6]
    assert torch.equal(resumed.vectors, whole.vectors) and resumed.history == whole.history
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path):
    path = tmp_path / "run.ckpt"
    run(tiny, replace(FEW, steps=2), checkpoint=path)
    stored = path.read_bytes()
    with pytest.raises(ValueError, match=r"lr \(0\.01 there, 0\.02 now\)"):
        run(tiny, replace(FEW, steps=2, lr=0.02), checkpoint=path)
    with pytest.raises(ValueError, match="images differ"):
        invert(tiny, IMAGES[:3], token="<x>", settings=replace(FEW, steps=2), checkpoint=path)
    assert path.read_bytes() == stored
    assert run(tiny, replace(FEW, steps=4), checkpoint=path).step == 4  # prolonged
    path.write_bytes(stored[:100])
    with pytest.raises(ValueError, match="no readable checkpoint"):
        run(tiny, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    predict, calls = type(tiny).predict_noise, []

    def broken(self, x, t, context):
        calls.append(1)
        out = predict(self, x, t, context)
        return out * float("nan") if len(calls) == 4 else out

    monkeypatch.setattr(type(tiny), "predict_noise", broken)
    with pytest.raises(InversionError, match=r"loss nan .* at step 4"):
        run(tiny, checkpoint=path)
    assert len(load_checkpoint(path)["losses"]) == 2


def test_vectors_that_never_move_are_an_error(tiny, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: None)
    with pytest.raises(InversionError, match="after 2 steps the vectors have not moved"):
        run(tiny, replace(FEW, steps=2, batch_size=1))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"n_vectors": 75}, "1 to 74"),
        ({"n_vectors": 0}, "1 to 74"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"lr": -1.0}, "lr must be 1e-12 to 1000.0, got -1.0"),
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"latents": "never"}, "once, mean, resample"),
        ({"loss": "l1"}, "plain, min_snr"),
    ],
)
def test_wrong_settings(change, problem):
    with pytest.raises(ValueError, match=problem):
        replace(FEW, **change)


def test_settings_that_are_not_given_follow_the_base(tiny):
    assert tiny.preset == "tiny"
    word = run(tiny, InversionSettings(steps=2, n_vectors=3))
    used = word.record["settings"]
    assert (used["steps"], used["n_vectors"]) == (2, 3)
    assert (used["batch_size"], used["lr"], used["schedule"]) == (8, 0.01, "linear")
    given = run(tiny, InversionSettings(steps=2, n_vectors=3, batch_size=1, schedule="constant"))
    assert given.record["settings"]["batch_size"] == 1
    assert given.record["settings"]["schedule"] == "constant"


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_seeds_at_the_ends_of_what_torch_takes(tiny, seed):
    assert run(tiny, replace(FEW, steps=1, seed=seed, init="mean")).step == 1
    with pytest.raises(ValueError, match="seed must be"):
        replace(FEW, seed=seed * 3)


# ------------------------------------------------------------------- float16, memory, speed


def test_out_of_memory_turns_checkpointing_on_until_the_end(tiny, monkeypatch):
    whole = run(tiny)
    predict, calls = type(tiny).predict_noise, []

    def short_of_memory(self, x, t, context):
        calls.append(self.unet.is_gradient_checkpointing)
        if len(calls) > 3 and not self.unet.is_gradient_checkpointing:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(self, x, t, context)

    monkeypatch.setattr(type(tiny), "predict_noise", short_of_memory)
    steps = []
    with pytest.warns(UserWarning, match="out of GPU memory: checkpointing is on"):
        word = run(tiny, callback=lambda state: steps.append(state["step"]))
    assert calls == [False] * 4 + [True] * 3 and steps == [1, 2, 3, 4, 5, 6]
    assert not tiny.unet.is_gradient_checkpointing, "left on for the next run"
    torch.testing.assert_close(word.vectors, whole.vectors, rtol=0, atol=1e-5)

    def hopeless(self, x, t, context):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(tiny), "predict_noise", hopeless)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(torch.cuda.OutOfMemoryError, match=r"in spite of check.*batch_size than 2"),
    ):
        run(tiny)
    assert not tiny.unet.is_gradient_checkpointing


def small(dtype=torch.float32, **options):
    return load_base("small-random", device="cpu", dtype=dtype, **options)


def test_float16_trains_as_float32_does():
    words = {}
    for dtype in (torch.float32, torch.float16):
        seen = []
        settings = replace(FEW, steps=4, batch_size=1)
        words[dtype] = run(small(dtype), settings, callback=seen.append), seen
    (full, seen), (half, half_seen) = words.values()
    losses, norms = (
        [[s[key] for s in part] for part in (seen, half_seen)] for key in ("loss", "grad_norm")
    )
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert norms[1] == pytest.approx(norms[0], rel=0.2) and min(norms[1]) > 0
    assert half.vectors.dtype == torch.float32 and not torch.equal(half.vectors, full.vectors)


def start_run(half):
    return Run({"vectors": torch.zeros(2, 3)}, {"vectors": 0.1}, half)


def test_a_step_whose_float16_gradient_overflows_is_skipped_and_the_scale_falls():
    run_ = start_run(half=True)
    one = torch.ones(())
    assert float(run_.scaler.scale(one)) == 2**16
    run_.update(torch.tensor(1.0), [torch.full((2, 3), float("inf"))], 1)
    assert run_.step == 1 and run_.tensors["vectors"].abs().max() == 0
    scale = float(run_.scaler.scale(one))
    assert scale == 2**15
    norm = run_.update(torch.tensor(1.0), [torch.full((2, 3), scale)], 1)
    first = run_.tensors["vectors"].flatten().tolist()[0]
    assert norm == pytest.approx(6**0.5) and first == pytest.approx(-0.1)
    other = start_run(half=True)
    other.load_state_dict(run_.state_dict())
    assert other.step == 2 and float(other.scaler.scale(one)) == 2**15


def test_a_gradient_that_is_not_finite_is_an_error_in_float32():
    run_ = start_run(half=False)
    with pytest.raises(InversionError, match="gradient inf at step 1"):
        run_.update(torch.tensor(1.0), [torch.full((2, 3), float("inf"))], 1)


def test_attention_scores_beyond_float16_stay_finite():
    """SD 2's attention overflows in float16 unless the scores are kept in float32."""
    from diffusers.models.attention_processor import AttnProcessor

    base = small(torch.float16)
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


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_never_waits_for_the_host_so_that_a_cuda_graph_can_hold_it(prediction):
    base = replace(small(), prediction=prediction)
    vectors = torch.randn(4, base.width, requires_grad=True)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, 8, 8))
    compare_noise(base, base.text(vectors), *inputs, torch.ones(1000))  # fills the caches
    with Ops() as ops:
        torch.autograd.grad(
            compare_noise(base, base.text(vectors), *inputs, torch.ones(1000)), vectors
        )
    assert "aten::convolution" in ops.names
    # item(), torch.tensor(…) and data-dependent shapes would break the recording
    for forbidden in ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select"):
        assert f"aten::{forbidden}" not in ops.names, forbidden


def test_a_fast_base_without_a_compiler_trains_and_draws_the_same(monkeypatch):
    monkeypatch.setattr("medbudget.base.shutil.which", lambda name: None)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        fast = small(fast=True)
    slow = small()
    assert fast.fast and not slow.fast and fast.hash == slow.hash
    losses = [run(base, replace(FEW, steps=5)).history["loss"] for base in (fast, slow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)
    a, b = (sample(base, "a", n=2, steps=3).int() for base in (fast, slow))
    assert int((a - b).abs().max()) <= 1


def test_wrong_images_and_tokens(tiny):
    with pytest.raises(ValueError, match="angle brackets"):
        invert(tiny, IMAGES, token="x", settings=FEW)
    with pytest.raises(ValueError, match="vocabulary"):
        invert(tiny, IMAGES, token="<|startoftext|>", settings=FEW)
    with pytest.raises(ValueError, match="square"):
        invert(tiny, IMAGES[:, :, :32], token="<x>", settings=FEW)
    with pytest.raises(ValueError, match="multiple of 16"):
        invert(tiny, IMAGES[:, :, :40, :40], token="<x>", settings=FEW)
    one = invert(tiny, IMAGES[:1], token="<x>", settings=replace(FEW, steps=1))
    assert one.data == "1 images of 64 px"


def test_image_losses_are_the_training_loss_of_each_image(tiny):
    from medbudget.training.inversion import compute_image_losses

    images = make_phantoms("chest", "healthy", 3, size=tiny.size).images
    vectors = tiny.token_rows("*").repeat(4, 1)
    losses = compute_image_losses(tiny, vectors, images, draws=2, seed=5)
    assert losses.shape == (3, 2)
    z = tiny.encode(images)
    noise = torch.randn((2, *z.shape[1:]), generator=torch.Generator().manual_seed(5))
    for k, t in enumerate((250, 750)):
        with torch.no_grad():
            times = torch.full((3,), t)
            want = compare_noise(tiny, tiny.text(vectors), z, times, noise[k].expand_as(z))
        assert losses[:, k].mean() == pytest.approx(float(want), rel=1e-4)
    # an image's loss does not depend on its company
    alone = compute_image_losses(tiny, vectors, images[1:2], draws=2, seed=5)
    torch.testing.assert_close(alone[0], losses[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(losses, compute_image_losses(tiny, "", images, draws=2, seed=5))
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        compute_image_losses(tiny, "", images, draws=0)
