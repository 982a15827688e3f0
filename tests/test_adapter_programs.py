"""Other programs read our adapters: their names, scales and versions, and diffusers itself.

A1111 and ComfyUI cannot run here. What they expect was read off their public sources, and kohya-ss'
(commits in the tests), and is written here anew.
"""

import re
from itertools import product

import pytest
import torch
from loras import make
from safetensors import safe_open
from test_loading import unet_key

from medbudget import Adapter, TuneSettings, load_base, make_phantoms, tune
from medbudget.adapters import adapt

FEW = TuneSettings(rank=4, steps=2, batch_size=1, lr=1e-2)
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"  # 3 x 3, as LoCon and kohya's conv_dim have it


@pytest.fixture(scope="module")
def sd2(paper_base):
    return load_base(paper_base.snapshot, device="cpu")


@pytest.fixture(scope="module")
def trained(sd2, tmp_path_factory):
    images = make_phantoms("prostate", "tumour", 2, size=sd2.size).images
    adapter = tune(sd2, images, token="<x>", settings=FEW)
    return adapter.save(tmp_path_factory.mktemp("adapter") / "a.safetensors")


def read(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def list_attention():
    """Return the attention layers of Stable Diffusion 1 and 2 by diffusers' names."""
    places = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    places += ["mid_block.attentions.0"]
    places += [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    parts = product(places, ("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out.0"))
    return [f"{place}.transformer_blocks.0.{attn}.{part}" for place, attn, part in parts]


def test_names_ranks_and_alphas_are_those_of_kohyas_scripts(sd2, trained):
    """kohya-ss/sd-scripts 48d368f, networks/lora.py.

    ``lora_unet_`` and the layer's name with _ for every dot; ``.lora_down.weight (r, in)``,
    ``.lora_up.weight (out, r)``, ``.alpha`` a number, of which alpha / r scales the product.
    ComfyUI (comfy/lora.py, `model_lora_keys_unet`) makes the same names of diffusers' layers.
    """
    tensors, _ = read(trained)
    layers = list_attention()
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    names = [f"lora_unet_{layer.replace('.', '_')}" for layer in layers]
    assert len(names) == 16 * 8 and set(tensors) == {f"{n}.{p}" for n, p in product(names, parts)}
    for name, layer in zip(names, layers):
        out, into = sd2.unet.get_submodule(layer).weight.shape
        assert tensors[f"{name}.lora_down.weight"].shape == (4, into)
        assert tensors[f"{name}.lora_up.weight"].shape == (out, 4)
        assert tensors[f"{name}.alpha"].shape == () and tensors[f"{name}.alpha"] == 4
        assert tensors[f"{name}.lora_down.weight"].dtype == torch.float32


def a1111_name(key):
    """Return the module that A1111 looks for (extensions-builtin/Lora/networks.py of 1.10)."""
    if match := re.fullmatch(r"lora_unet_down_blocks_(\d)_attentions_(\d)_(.+)", key):
        block, j, rest = int(match[1]), int(match[2]), match[3]
        return f"diffusion_model_input_blocks_{1 + 3 * block + j}_1_{rest}"
    if match := re.fullmatch(r"lora_unet_up_blocks_(\d)_attentions_(\d)_(.+)", key):
        block, j, rest = int(match[1]), int(match[2]), match[3]
        return f"diffusion_model_output_blocks_{3 * block + j}_1_{rest}"
    return key.replace("lora_unet_mid_block_attentions_0", "diffusion_model_middle_block_1")


def test_a1111_finds_every_layer(trained):
    found = {a1111_name(key.partition(".")[0]) for key in read(trained)[0]}
    ldm = {unet_key(f"{layer}.weight", layers=2) for layer in list_attention()}
    assert found == {
        f"diffusion_model_{key.removesuffix('.weight').replace('.', '_')}" for key in ldm
    }


def test_other_programs_add_what_we_add(sd2, tmp_path):
    """alpha / r times up @ down, both flattened: A1111's network_lora.py, ComfyUI, kohya-ss.

    A1111 takes r from lora_down's first dimension, and 1 for the scale where alpha is missing.
    """
    shape = sd2.unet.get_submodule("down_blocks.1.resnets.0.conv1").weight.shape
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{key}.lora_down.weight": torch.randn(3, 1024, generator=generator),
        f"{key}.lora_up.weight": torch.randn(80, 3, generator=generator),
        f"{key}.alpha": torch.tensor(1.5),
        f"{CONV}.lora_down.weight": torch.randn(2, *shape[1:], generator=generator),
        f"{CONV}.lora_up.weight": torch.randn(shape[0], 2, 1, 1, generator=generator),
    }
    path = Adapter(tensors).save(tmp_path / "a.safetensors")
    stored, _ = read(path)
    tuned = adapt(sd2, [Adapter.load(path)])
    for name, layer, scale in (
        (key, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 1.5 / 3),
        (CONV, "down_blocks.1.resnets.0.conv1", 1),
    ):
        up, down = (stored[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
        change = scale * torch.einsum("or,ri->oi", up.reshape(len(up), -1), down.flatten(1))
        before, after = (base.unet.get_submodule(layer).weight for base in (sd2, tuned))
        torch.testing.assert_close(after, before + change.view_as(before), rtol=1e-4, atol=1e-5)


def test_a1111_lists_an_adapter_of_sd_2_with_sd_2(trained, tmp_path):
    """Its network.py takes files with metadata for SD 1 unless ``ss_v2`` is "True".

    It hides those of another version in its list (ui_extra_networks_lora.py), as kohya-ss' own
    files of SD 2 would be without it.
    """
    assert read(trained)[1]["ss_v2"] == "True"
    assert "ss_v2" not in read(make().save(tmp_path / "a.safetensors"))[1]
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, names in ((1024, {"medbudget", "ss_v2"}), (768, {"medbudget"})):
        full = Adapter({f"{key}.diff": torch.ones(1280, width)})
        contents = {full.save(tmp_path / "b.safetensors").read_bytes() for _ in range(8)}
        assert len(contents) == 1 and set(read(tmp_path / "b.safetensors")[1]) == names


def draw(base, text, change=lambda pipe: None):
    """Draw an image by diffusers' pipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    change(pipe)
    noise = torch.randn(1, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    prompts = {"prompt_embeds": base.text(text), "negative_prompt_embeds": base.text("")}
    return torch.from_numpy(pipe(
        **prompts, latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="np",
    ).images)  # fmt: skip


def check_diffusers(load, adapter, folder, text):
    """Our file in diffusers' pipeline draws what the merged base does, and not what the plain one does."""
    base, changed = load(), load()  # diffusers changes the networks that it is given
    path = adapter.save(folder / "a.safetensors")
    plain, merged = draw(base, text), draw(adapt(base, [adapter]), text)
    loaded = draw(changed, text, lambda pipe: pipe.load_lora_weights(str(path)))
    torch.testing.assert_close(loaded, merged, rtol=0, atol=1e-3)
    assert (loaded - plain).abs().max() > 0.02


def add_layers(base, names, scale):
    """Return random changes of rank 2 to layers, as kohya-ss lays them out."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in names:
        shape = base.unet.get_submodule(name).weight.shape
        key = f"lora_unet_{name.replace('.', '_')}"
        up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator)
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=generator)
        tensors[f"{key}.lora_up.weight"] = scale * up
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors


OTHERS = (
    "mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "down_blocks.1.resnets.0.conv1",
)  # fmt: skip


def test_diffusers_draws_the_same_image(tiny, tmp_path):
    """On a base like SD 1: proj_in is a 1 x 1 convolution.

    Each file has one rank and one alpha, as ours have: of several, diffusers (0.42) takes the most
    frequent for all layers of the attention, with a warning of peft.
    """
    assert tiny.unet.mid_block.attentions[0].proj_in.weight.ndim == 4

    def load():
        return load_base("tiny", device="cpu")

    check_diffusers(load, make(rank=4, scale=0.1), tmp_path, "red ellipse")
    check_diffusers(load, Adapter(add_layers(tiny, OTHERS, 0.3)), tmp_path, "red ellipse")


def test_diffusers_draws_the_same_image_on_the_layout_of_sd_2(paper_base, trained, tmp_path):
    """proj_in is a linear layer, texts are 1024 wide; a file of ours, and of other layers."""

    def load():
        return load_base(paper_base.snapshot, device="cpu")

    base = load()
    assert base.unet.mid_block.attentions[0].proj_in.weight.ndim == 2
    adapter = Adapter.load(trained)
    strong = {k: 30 * v if k.endswith("lora_up.weight") else v for k, v in adapter.tensors.items()}
    check_diffusers(load, Adapter(strong), tmp_path, "a scan")
    check_diffusers(load, Adapter(add_layers(base, OTHERS, 0.3)), tmp_path, "a scan")
