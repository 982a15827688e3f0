"""Bases from files: LDM's against diffusers' layout, CLIP's tokenizer, what a network predicts."""

import hashlib
import importlib.metadata
import importlib.util
import json
import pickle
import subprocess
import sys
import types
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from medbudget import (
    Embedding,
    InversionSettings,
    checkpoints,
    invert,
    load_base,
    loading,
    make_phantoms,
    sample,
)
from medbudget.architectures import (
    build_networks,
    build_tokenizer,
    noise_schedule,
    read_architectures,
)
from medbudget.known import BaseError
from medbudget.loading import hash_weights, measure_prediction
from medbudget.verify import verify_base

TEXTS = (
    "A photo of a cat, it's 3 years old!",
    "  two   spaces\tand\nlines  ",
    "ÉCOLE café naïve 你好 – 2024's x-ray",
    "don't we'll they're I'd",
    "<lora:1> (weights:1.3) [a|b] C++ _under_score_",
    "",
)


def test_the_tokenizer_is_clips():
    try:  # the package itself cannot be imported with new setuptools
        clip = importlib.metadata.distribution("clip-anytorch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs clip-anytorch, which k-diffusion brings")
    path = clip.locate_file("clip/simple_tokenizer.py")
    reference = importlib.util.spec_from_file_location("reference_tokenizer", path)
    module = importlib.util.module_from_spec(reference)
    reference.loader.exec_module(module)
    theirs, ours = module.SimpleTokenizer(), build_tokenizer("!")
    for text in TEXTS:
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text), text
    assert len(ours) == 49408
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (49406, 49407, 0)
    assert build_tokenizer("<|endoftext|>").pad_token_id == 49407
    assert ours("*", add_special_tokens=False)["input_ids"] == [265]  # A1111's default init


def test_shipped_architectures_have_the_published_sizes():
    counts = {}
    for name in ("sd1", "sd2"):
        networks = build_networks(read_architectures()[name], "meta")
        counts[name] = [sum(p.numel() for p in network.parameters()) for network in networks]
    # VAE, U-Net, text encoder; the U-Nets' are 860 M and 866 M in the model cards
    assert counts["sd1"] == [83_653_863, 859_520_964, 123_060_480]
    assert counts["sd2"] == [83_653_863, 865_910_724, 340_387_840]


def test_the_schedule_is_stable_diffusions(tiny):
    torch.testing.assert_close(noise_schedule(), tiny.alphas_cumprod, rtol=1e-5, atol=0)


def test_random_weights_are_seeded_and_said_to_be_random():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b = (load_base("small-random", device="cpu") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before), "the global stream was touched"
    assert a.hash == b.hash and (a.note, a.preset, a.size) == ("random weights", "paper", 64)
    images = sample(a, "a cat", n=1, steps=2)
    assert images.shape == (1, 3, 64, 64) and images.float().std() > 0
    checks = verify_base(a)
    assert not checks["prediction"][1] and not checks["autoencoder"][1]


def test_the_embedded_base_passes_every_check(tiny):
    checks = verify_base(tiny)
    assert all(passed for _, passed in checks.values()), checks
    assert float(checks["prediction"][0].split()[-1]) > 0.99


# --------------------------------------------------------------------------- LDM's layout

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def split(key):
    stem, _, kind = key.rpartition(".")
    return stem.split("."), kind


def unet_key(key, layers):
    parts, kind = split(key)
    if parts[0] in ("down_blocks", "up_blocks"):
        block, what, j = int(parts[1]), parts[2], int(parts[3])
        down = parts[0] == "down_blocks"
        number = block * (layers + 1) + (1 + j if down else j)
        stem = f"{'input' if down else 'output'}_blocks.{number}"
        if what == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{kind}"
        if what == "upsamplers":  # after the attention, which the first up block has not
            return f"output_blocks.{number + layers}.{1 if block == 0 else 2}.conv.{kind}"
        if what == "resnets":
            return f"{stem}.0.{RESNET[parts[4]]}.{kind}"
        return f"{stem}.1.{'.'.join(parts[4:])}.{kind}"
    if parts[0] == "mid_block":
        if parts[1] == "resnets":
            return f"middle_block.{2 * int(parts[2])}.{RESNET[parts[3]]}.{kind}"
        return f"middle_block.1.{'.'.join(parts[3:])}.{kind}"
    return f"{UNET['.'.join(parts)]}.{kind}"


def vae_key(key, blocks):
    parts, kind = split(key)
    if len(parts) > 1 and parts[1] in ("down_blocks", "up_blocks"):
        down = parts[1] == "down_blocks"
        i = int(parts[2]) if down else blocks - 1 - int(parts[2])
        stem = f"{parts[0]}.{'down' if down else 'up'}.{i}"
        if parts[3] == "resnets":
            name = parts[5].replace("conv_shortcut", "nin_shortcut")
            return f"{stem}.block.{parts[4]}.{name}.{kind}"
        return f"{stem}.{'downsample' if down else 'upsample'}.conv.{kind}"
    if len(parts) > 1 and parts[1] == "mid_block":
        if parts[2] == "resnets":
            return f"{parts[0]}.mid.block_{int(parts[3]) + 1}.{parts[4]}.{kind}"
        return f"{parts[0]}.mid.attn_1.{ATTENTION['.'.join(parts[4:])]}.{kind}"
    return key.replace("conv_norm_out", "norm_out")


def to_ldm(base, *, openclip):
    """Write diffusers' weights under LDM's names, as CompVis and Stability published theirs."""
    state = {}
    layers = base.unet.config.layers_per_block
    for key, value in base.unet.state_dict().items():
        state[f"model.diffusion_model.{unet_key(key, layers)}"] = value
    for key, value in base.vae.state_dict().items():
        name = vae_key(key, len(base.vae.config.block_out_channels))
        if ".attn_1." in name and value.ndim == 2:
            value = value[:, :, None, None]  # LDM has 1x1 convolutions there
        state[f"first_stage_model.{name}"] = value
    for key, value in base.text_encoder.state_dict().items():
        key = key.removeprefix("text_model.")
        if not openclip:
            state[f"cond_stage_model.transformer.text_model.{key}"] = value
            continue
        stem = "cond_stage_model.model."
        top = {
            "embeddings.token_embedding.weight": "token_embedding.weight",
            "embeddings.position_embedding.weight": "positional_embedding",
            "final_layer_norm.weight": "ln_final.weight",
            "final_layer_norm.bias": "ln_final.bias",
        }
        if key in top:
            state[stem + top[key]] = value
            continue
        _, _, number, rest = key.split(".", 3)
        part, kind = rest.rsplit(".", 1)
        stem += f"transformer.resblocks.{number}."
        if part in CLIP:
            state[f"{stem}{CLIP[part]}.{kind}"] = value
        elif part == "self_attn.q_proj":  # q, k and v are one matrix
            rows = [value]
            for other in ("k_proj", "v_proj"):
                name = key.replace("q_proj", other)
                rows.append(dict(base.text_encoder.state_dict())[name_in(base, name)])
            state[f"{stem}attn.in_proj_{kind}"] = torch.cat(rows)
    if openclip:
        width = base.width
        state["cond_stage_model.model.text_projection"] = torch.eye(width)
        # the 24th layer, which SD 2 does not use
        for key in [k for k in state if "resblocks.0." in k]:
            state[key.replace("resblocks.0.", "resblocks.23.")] = state[key] + 1
    return {key: value.clone().contiguous() for key, value in state.items()}


def name_in(base, key):
    return key if key in base.text_encoder.state_dict() else f"text_model.{key}"


def fit_output(base, noise, flat):
    """Fit the last layer so that at the highest noise it returns `noise` times its input, plus.

    For .5 everywhere it returns `flat`. (1, .5) is a network of epsilon, (0, -3) one of v.
    """
    seen = []
    hook = base.unet.conv_out.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x[16:] = 0.5
    wanted = x * noise
    wanted[16:] = flat
    with torch.no_grad():
        t = torch.full((24,), 999)
        base.unet(x, t, encoder_hidden_states=base.text("").expand(24, -1, -1))
        hook.remove()
        rows = torch.nn.functional.unfold(seen[0], 3, padding=1).mT.flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        fit = torch.linalg.lstsq(rows, wanted.permute(0, 2, 3, 1).flatten(0, 2)).solution
        weight = base.unet.conv_out.weight
        weight.copy_(fit[:-1].T.reshape(weight.shape))
        base.unet.conv_out.bias.copy_(fit[-1])
    base.hash = hash_weights(base.vae, base.unet, base.text_encoder)
    return base


def small(monkeypatch, **changes):
    """Let `small` be the only known architecture, with other widths."""
    kind = deepcopy(read_architectures()["small"])
    for key, value in changes.items():
        part, name = key.split("__") if "__" in key else (None, key)
        (kind[part] if part else kind)[name] = value
    for module in (loading, checkpoints):
        monkeypatch.setattr(module, "read_architectures", lambda: {"small": kind})
    return fit_output(load_base("small-random", device="cpu"), 1, 0.5)


SD1_LIKE = {
    "unet__cross_attention_dim": 768, "unet__use_linear_projection": False,
    "text_encoder__hidden_size": 768, "text_encoder__intermediate_size": 64,
    "text_encoder__num_hidden_layers": 1, "text_encoder__hidden_act": "quick_gelu",
    "pad_token": "<|endoftext|>",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_single_file_gives_the_outputs_of_diffusers_layout(kind, monkeypatch, tmp_path):
    base = small(monkeypatch, **(SD1_LIKE if kind == "sd1" else {}))
    state = to_ldm(base, openclip=kind == "sd2")
    if kind == "sd1":
        path = tmp_path / "x.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "x.ckpt"
        torch.save({"state_dict": state, "global_step": 1}, path)
    loaded = load_base(path, device="cpu")
    assert loaded.hash == base.hash and loaded.note == ""
    assert (
        loaded.checkpoint_hash
        == (hashlib.sha256(path.read_bytes()[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8])
    )
    images = make_phantoms("chest", "healthy", 2, size=64).images
    assert torch.equal(loaded.encode(images), base.encode(images))
    with torch.no_grad():
        assert torch.equal(loaded.text("an x-ray"), base.text("an x-ray"))
    made = [sample(b, "an x-ray", n=1, steps=2) for b in (loaded, base)]
    assert (made[0].int() - made[1].int()).abs().max() <= 1
    if kind == "sd1":
        assert loaded.width == 768
        wide = Embedding(torch.ones(2, 1024), "<sd2>")
        with pytest.raises(ValueError, match=r"width 1024.*made for SD 2\.x"):
            sample(loaded, "<sd2>", embeddings=[wide], n=1, steps=1)
        few = InversionSettings(n_vectors=2, steps=2)
        word = invert(loaded, images, token="<x>", settings=few)
        assert word.vectors.shape == (2, 768) and word.base == "x.safetensors"


def test_a_folder_and_a_file_of_the_same_weights_are_the_same_base(monkeypatch, tmp_path):
    base = small(monkeypatch)
    folder = save_folder(base, tmp_path / "base")
    save_file(to_ldm(base, openclip=True), tmp_path / "x.safetensors")
    a, b = load_base(folder, device="cpu"), load_base(tmp_path / "x.safetensors", device="cpu")
    assert a.hash == b.hash == base.hash and a.checkpoint_hash == "" != b.checkpoint_hash
    torch.testing.assert_close(a.alphas_cumprod, b.alphas_cumprod, rtol=1e-5, atol=0)
    with torch.no_grad():  # "!" is a word although SD 2 pads with it
        assert torch.equal(a.text("wow! a cat"), b.text("wow! a cat"))
        assert not torch.equal(a.text("wow! a cat"), a.text("wow a cat"))


def save_folder(base, folder, **scheduler):
    """Write a base in diffusers' layout."""
    from diffusers import DDIMScheduler
    from transformers import PreTrainedTokenizerFast

    for part in ("vae", "unet", "text_encoder"):
        getattr(base, part).save_pretrained(folder / part)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDIMScheduler(**schedule).save_pretrained(folder / "scheduler")
    config = folder / "scheduler/scheduler_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    del content["prediction_type"]
    config.write_text(json.dumps({**content, **scheduler}))
    PreTrainedTokenizerFast(
        tokenizer_object=base.tokenizer.backend_tokenizer, pad_token="!", eos_token="<|endoftext|>",
        bos_token="<|startoftext|>",
    ).save_pretrained(folder / "tokenizer")  # fmt: skip
    return folder


@pytest.mark.parametrize(("fit", "kind"), [((1, 0.5), "epsilon"), ((0, -3), "v_prediction")])
def test_what_a_network_predicts_is_measured_where_nothing_states_it(
    monkeypatch, tmp_path, fit, kind
):
    base = fit_output(small(monkeypatch), *fit)
    assert measure_prediction(base) == kind
    save_file(to_ldm(base, openclip=True), tmp_path / "x.safetensors")
    folder = save_folder(base, tmp_path / "silent")
    for source in (tmp_path / "x.safetensors", folder):
        assert load_base(source, device="cpu").prediction == kind
    for stated in ("epsilon", "v_prediction"):
        said = save_folder(base, tmp_path / stated, prediction_type=stated)
        loaded = load_base(said, device="cpu")
        assert loaded.prediction == stated  # taken at its word, which `base verify` measures
        assert verify_base(loaded)["prediction"][1] == (stated == kind)
    other = save_folder(base, tmp_path / "sample", prediction_type="sample")
    with pytest.raises(BaseError, match="predicts sample; allowed are epsilon and v_prediction"):
        load_base(other, device="cpu")


def test_a_network_that_predicts_nothing_is_refused(tmp_path):
    folder = save_folder(load_base("small-random", device="cpu"), tmp_path / "b")
    with pytest.raises(BaseError, match="predicts neither epsilon nor v"):
        load_base(folder, device="cpu")


def test_v_is_turned_into_epsilon_as_diffusers_does(tiny):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction",
    )  # fmt: skip
    scheduler.set_timesteps(1000)
    base = replace(tiny, prediction="v_prediction")
    x, context = torch.randn(2, 8, 16, 16), tiny.text("red ground")
    for t in (0, 1, 500, 999):
        with torch.no_grad():
            context2 = context.expand(2, -1, -1)
            v = tiny.predict_noise(x, t, context2)
            z = scheduler.step(v, t, x).pred_original_sample
            a = scheduler.alphas_cumprod[t]
            expected = (x - a.sqrt() * z) / (1 - a).sqrt()
            found = base.predict_noise(x, t, context2)
            batch = base.predict_noise(x, torch.tensor([t, t]), context2)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(batch, found)


def test_files_that_are_no_base(monkeypatch, tmp_path):
    base = small(monkeypatch)
    state = to_ldm(base, openclip=True)
    some = next(key for key in state if "middle_block" in key)
    cross = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    cases = [
        ({k: v for k, v in state.items() if k != some}, "lacks 1 tensors of UNet2D"),
        ({**state, cross: torch.zeros(32, 2048)}, "width 2048; known are 64"),
        (
            {**state, first: torch.zeros(32, 9, 3, 3)},
            "inpainting model: its U-Net takes 9 channels",
        ),
        ({"lora_up.weight": torch.zeros(2)}, "is a LoRA"),
        ({"unet.weight": torch.zeros(2)}, "no whole Stable Diffusion"),
        ({**state, "conditioner.embedders.0.x": torch.zeros(1)}, "is Stable Diffusion XL"),
        ({"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, "is Stable Diffusion 3"),
        ({"model.diffusion_model.double_blocks.0.x": torch.zeros(1)}, "is Flux"),
        ({"emb_params": torch.zeros(1)}, "is an embedding: pass it with --embeddings"),
    ]
    for i, (tensors, problem) in enumerate(cases):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        with pytest.raises(BaseError, match=problem):
            load_base(tmp_path / f"{i}.safetensors", device="cpu")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "0.safetensors").read_bytes()[:1000])
    (tmp_path / "x.bin").touch()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for name in ("lfs.ckpt", "lfs.safetensors"):
        (tmp_path / name).write_bytes(pointer)
    (tmp_path / "page.ckpt").write_bytes(b"<!doctype html><html>")
    for name, problem in (
        ("cut.safetensors", "truncated"), ("x.bin", r"ends in \.ckpt"), ("lfs.ckpt", "git-lfs pointer"),
        ("lfs.safetensors", "git-lfs pointer"), ("page.ckpt", "web page"),
    ):  # fmt: skip
        with pytest.raises(BaseError, match=problem):
            load_base(tmp_path / name, device="cpu")


class Evil:
    def __reduce__(self):
        return print, ("code in the checkpoint ran",)


def test_a_checkpoints_code_never_runs(tmp_path, capsys, monkeypatch):
    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(BaseError, match="code in a file is never run"):
        checkpoints.read_checkpoint(tmp_path / "evil.ckpt")
    assert "ran" not in capsys.readouterr().out
    # official files hold a class of PyTorch Lightning as a key; it is read as an inert one
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": {module.ModelCheckpoint: {"k": 1}}}
    torch.save(content, tmp_path / "official.ckpt")
    assert pickle.dumps(module.ModelCheckpoint)  # it could be imported while writing
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert list(checkpoints.read_checkpoint(tmp_path / "official.ckpt")) == ["a"]


def test_a_half_base_is_refused(tmp_path, tiny):
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(loading.TINY, folder)
    config = folder / "scheduler/scheduler_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**content, "beta_end": 0.02}))
    with pytest.raises(BaseError, match="another noise schedule"):
        load_base(folder, device="cpu")
    config.write_text(json.dumps(content))
    parts = loading.load_folder(folder, "base")
    parts.text_encoder = build_networks(read_architectures()["small"])[2]
    from medbudget.loading import _assemble

    with pytest.raises(BaseError, match=r"width 96.*writes 64.*different models"):
        _assemble(parts, "mixed", torch.device("cpu"), torch.float32)


def copy_tiny(folder, part, change):
    """Copy the embedded base, with the tensors of one part as `change` returns them."""
    import shutil

    shutil.copytree(loading.TINY, folder)
    (path,) = (folder / part).glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def drop_one(tensors):
    return dict(list(tensors.items())[1:])


def double(tensors):
    """Return a text encoder's tensors under both names that transformers gave them."""
    flat = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    return flat | {f"text_model.{key}": value + 1 for key, value in flat.items()}


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("unet", drop_one, "lacks 1 of UNet2DConditionModel's tensors"),
        ("vae", drop_one, "lacks 1 of AutoencoderKL's"),
        ("text_encoder", drop_one, "lacks 1 of CLIPTextModel's"),
        ("text_encoder", lambda t: {f"other.{k}": v for k, v in t.items()}, "lacks .*CLIPTextModel's"),
        ("unet", lambda t: {**t, "more.weight": torch.ones(1)}, "1 of .*more.weight"),
        ("text_encoder", lambda t: {**t, "encoder.layers.99.x": torch.ones(1)}, "layers.99"),
        ("text_encoder", double, "twice, e.g. .* and text_model"),
    ],
)  # fmt: skip
def test_a_network_of_which_a_part_would_stay_random_is_refused(tmp_path, part, change, problem):
    folder = copy_tiny(tmp_path / "b", part, change)
    with pytest.raises(BaseError, match=problem):
        load_base(folder, device="cpu")


def test_the_hash_does_not_depend_on_the_names_that_a_version_gives(tmp_path, tiny):
    """transformers before 5.6 and since: the same folder, two layouts, one hash."""
    assert tiny.hash == "bef938fb007f"  # recorded results are bound to it
    for name, change in (
        ("prefixed", lambda t: {f"text_model.{k.removeprefix('text_model.')}": v for k, v in t.items()}),
        ("flat", lambda t: {k.removeprefix("text_model."): v for k, v in t.items()}),
    ):  # fmt: skip
        base = load_base(copy_tiny(tmp_path / name, "text_encoder", change), device="cpu")
        assert base.hash == "bef938fb007f", name
    wrapped = torch.nn.ModuleDict({"text_model": tiny.text_encoder})  # the older class
    assert hash_weights(tiny.vae, tiny.unet, wrapped) == "bef938fb007f"


def test_loading_says_nothing():
    """accelerate is no dependency, and its absence is nobody's business."""
    code = """
from diffusers.models import modeling_utils
from medbudget import load_base
modeling_utils.is_accelerate_available = lambda: False
load_base("tiny", device="cpu")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
