"""Tuning: what is trained and what is not, resuming, refusals, and that it learns."""

import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from medbudget import Adapter, TuneSettings, load_base, make_phantoms, tune
from medbudget.adapters import adapt, copy_network
from medbudget.base import speed_up
from medbudget.loading import hash_weights
from medbudget.runs import load_checkpoint
from medbudget.training.inversion import compare_noise
from medbudget.training.loop import InversionError

IMAGES = make_phantoms("prostate", "tumour", 6).images
FEW = TuneSettings(
    rank=2, steps=4, lr=1e-2, batch_size=2, checkpoint_every=2, schedule="constant", word_lr=0.01
)
UP = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v.lora_up.weight"


def run(base, settings=FEW, **kwargs):
    return tune(base, IMAGES, settings=settings, **{"token": "<x>", **kwargs})


def equal(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(
        value.equal(b.tensors[key]) for key, value in a.tensors.items()
    )


@pytest.mark.parametrize("rank", [2, "full"])
def test_the_base_stays_as_it_is(tiny, rank):
    modules = (tiny.vae, tiny.unet, tiny.text_encoder)
    names, state = [*tiny.unet.state_dict()], torch.get_rng_state()
    adapter = run(tiny, replace(FEW, rank=rank, steps=2))
    assert hash_weights(*modules) == tiny.hash and torch.get_rng_state().equal(state)
    assert [*tiny.unet.state_dict()] == names
    for module in modules:
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert (adapter.rank, adapter.step, adapter.base_hash) == (rank, 2, tiny.hash)
    assert (
        adapter.record["settings"]["rank"] == rank and len(adapter.record["history"]["loss"]) == 2
    )


def test_every_attention_layer_has_its_change_and_one_step_is_adamws_first(tiny):
    # A starts as PyTorch draws a layer, B at zero: the first step moves B by the rate, A not at all
    adapter = run(tiny, replace(FEW, steps=1))
    layers = {name.partition(".")[0] for name in adapter.tensors}
    assert len(layers) == 14 * 4 and all("_attn" in name for name in layers)
    up, down = adapter.tensors[UP], adapter.tensors[UP.replace("lora_up", "lora_down")]
    assert up.abs().max() <= 0.01 * 1.0001 and up.abs().median() > 0.008  # gradients near eps
    assert down.shape == (2, 144) and down.abs().max() <= 1 / 12


def test_the_merged_base_predicts_what_was_trained(tiny):
    """What training saw last, and what `adapt` makes of the file, are the same network."""
    from medbudget.training.lora import _prepare

    settings = replace(FEW, rank=3)
    tuned, tensors = _prepare(tiny, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in tensors.values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    from medbudget.training.lora import _collect

    merged = adapt(tiny, [Adapter(_collect(tiny, tensors))])
    x = torch.randn(1, *tiny.latent_shape(), generator=generator)
    with torch.no_grad():
        context = tiny.text("red ellipse")
        ours, wanted = (base.predict_noise(x, 500, context) for base in (merged, tuned))
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
    assert (ours - tiny.predict_noise(x, 500, context)).abs().max() > 0.1


@pytest.mark.parametrize("changes", [{}, {"n_vectors": 2}, {"rank": "full", "lr": 1e-4}])
def test_training_lowers_the_loss_on_its_images(tiny, changes):
    adapter = run(tiny, replace(FEW, steps=12, **changes))
    z = tiny.encode(IMAGES)
    t = torch.full((6,), 700)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before = compare_noise(tiny, tiny.text("*"), z, t, noise)
        after = compare_noise(adapt(tiny, [adapter]), tiny.text(adapter.word.vectors), z, t, noise)
    assert after < before


def test_the_word_is_trained_only_where_it_is_to_be(tiny):
    fixed, trained = run(tiny), run(tiny, replace(FEW, n_vectors=2))
    assert fixed.word.vectors.equal(tiny.token_rows("*")) and fixed.token == "<x>"
    assert trained.word.vectors.shape == (2, 96)
    assert not trained.word.vectors.equal(tiny.token_rows("*").expand(2, -1))
    given = torch.randn(3, 96)
    assert run(tiny, init_vectors=given).word.vectors.equal(given)
    further = run(tiny, replace(FEW, n_vectors=5), init_vectors=given)
    assert further.word.vectors.shape == (3, 96) and not further.word.vectors.equal(given)
    assert further.record["settings"]["n_vectors"] == 3
    assert run(tiny, token=None).word is None
    with pytest.raises(ValueError, match="a word is trained under a token"):
        run(tiny, replace(FEW, n_vectors=2), token=None)


@pytest.mark.parametrize("changes", [{"n_vectors": 2}, {"rank": "full", "schedule": "linear"}])
def test_a_resumed_run_equals_an_undisturbed_one(tiny, tmp_path, changes):
    settings, checkpoint = replace(FEW, **changes), tmp_path / "c"

    class Killed(Exception):
        pass

    def kill(state):
        if state["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        run(tiny, settings, checkpoint=checkpoint, callback=kill)
    assert len(load_checkpoint(checkpoint)["losses"]) == 2
    resumed, whole = run(tiny, settings, checkpoint=checkpoint), run(tiny, settings)
    assert equal(resumed, whole) and resumed.word.vectors.equal(whole.word.vectors)
    assert resumed.record["history"] == whole.record["history"]
    with pytest.raises(ValueError, match="rank"):
        run(tiny, replace(settings, rank=7), checkpoint=checkpoint)


def test_the_seed_decides(tiny):
    assert equal(run(tiny), run(tiny)) and not equal(run(tiny), run(tiny, replace(FEW, seed=1)))


def test_settings_and_their_presets():
    tiny, paper = TuneSettings.preset("tiny"), TuneSettings.preset("paper")
    assert (paper.steps, paper.batch_size, paper.rank) == (50_000, 1, 16)
    assert TuneSettings.preset("paper", rank="full").lr == 5e-6 < paper.lr < tiny.lr
    assert TuneSettings.preset("tiny", rank="full", lr=1.0).lr == 1.0
    assert TuneSettings(rank="full").complete("paper").lr == 5e-6
    for rank in (0, 65, 2.5, "half", None, True):
        with pytest.raises(ValueError, match="rank must be"):
            TuneSettings(rank=rank)
    with pytest.raises(ValueError, match="n_vectors must be 0 to 74"):
        TuneSettings(n_vectors=75)


def test_what_diverges_or_never_moves_is_an_error(tiny):
    with warnings.catch_warnings(), pytest.raises(InversionError, match="lower the learning rate"):
        run(tiny, replace(FEW, lr=1e3, steps=30))
    still = replace(tiny, unet=copy_network(tiny.unet))
    still.unet.conv_out.weight = torch.nn.Parameter(torch.zeros(8, 64, 3, 3))
    with pytest.raises(InversionError, match="nothing has changed"):
        run(still)


@pytest.mark.parametrize("rank", [2, "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_trains_float32_tensors(rank, dtype):
    base = load_base("small-random", device="cpu", dtype=dtype)
    images = IMAGES[:2].repeat_interleave(base.size // 64, 2).repeat_interleave(base.size // 64, 3)
    settings = replace(FEW, rank=rank, steps=2, batch_size=1, lr=1e-3)
    adapter = tune(base, images, token="<x>", settings=settings)
    assert all(value.dtype == torch.float32 for value in adapter.tensors.values())
    assert sum(bool(v.any()) for k, v in adapter.tensors.items() if "alpha" not in k) > 20
    assert adapt(base, [adapter]).unet.dtype == dtype


def test_a_compiled_base_is_tuned_and_adapted(tiny, monkeypatch):
    monkeypatch.setattr(
        "medbudget.base.shutil.which", lambda name: None
    )  # no compiler: layout only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = speed_up(load_base("tiny", device="cpu"))
        adapter = run(fast, replace(FEW, steps=1))
        assert adapt(fast, [adapter]).fast and equal(adapter, adapter)
    slow = run(tiny, replace(FEW, steps=1))
    torch.testing.assert_close(
        adapter.tensors[UP].abs(), slow.tensors[UP].abs(), rtol=0.1, atol=1e-3
    )


def test_peft_is_loaded_by_training_alone():
    code = (
        "import sys, medbudget.training.lora, medbudget.sampling.sampler, medbudget.outputs\n"
        "assert 'peft' not in sys.modules, 'peft'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bad_images_and_tokens_are_refused(tiny):
    with pytest.raises(ValueError, match="must be square"):
        tune(tiny, IMAGES[..., :32], token="<x>", settings=FEW)
    for token, message in (("x", "not of the form"), ("<|endoftext|>", "vocabulary")):
        with pytest.raises(ValueError, match=message):
            run(tiny, token=token)
    with pytest.raises(ValueError, match="width 7"):
        run(tiny, init_vectors=torch.ones(2, 7))
