"""Stable Diffusion 2.0 in small, as a user of the paper's preset has it on the disk.

A base with the file names, configurations and tensor names of the removed repository, in the cache
of the hub's client: words of the real width, so that real embeddings fit, all else a sixteenth as
wide or less, 64 px, and random weights. Beside it the authors' eight embeddings as A1111 wrote
them, and folders in the layouts of `medbudget prepare`.
"""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from medbudget import Embedding, make_phantoms
from medbudget.architectures import SD, build_networks, noise_schedule, read_architectures
from medbudget.data import chexpert, layouts, pcam, picai
from medbudget.data.folder import prepare_folder
from medbudget.hub import PAPER_CHECKPOINT, PAPER_EMBEDDINGS
from medbudget.images import save_images

REPOSITORY = "stabilityai/stable-diffusion-2-base"
COMMIT = "d" * 40
SIZE = 64  # pixels
MERGES = 4000  # of CLIP's 48,894

# configurations as in the repository, where they differ from the architecture's
_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.8.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": [None, None], "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


@dataclass(frozen=True)
class PaperBase:
    """Where things lie."""

    hub: Path  # HF_HUB_CACHE
    snapshot: Path  # the base's folder in it
    cache: Path  # MEDBUDGET_CACHE, with the authors' words in `embeddings`
    torch_home: Path  # TORCH_HOME, with random weights of ResNet-18
    data: Path  # prostate, chest, histology, own: as `prepare picai|chexpert|pcam|folder` write
    images: Path  # 12 PNG of one class, no subfolders
    pcam: Path  # official files of PatchCamelyon

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which a process finds all of it, offline."""
        return {
            "HF_HUB_CACHE": str(self.hub), "HF_HUB_OFFLINE": "1",
            "MEDBUDGET_CACHE": str(self.cache), "TORCH_HOME": str(self.torch_home),
        }  # fmt: skip


def place_paper_base(folder: Path) -> PaperBase:
    """Say where in a folder everything lies."""
    return PaperBase(
        folder / "hub", folder / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots"
        / COMMIT, folder / "cache", folder / "torch", folder / "data", folder / "images",
        folder / "pcam",
    )  # fmt: skip


def make_paper_base(folder: Path) -> PaperBase:
    """Write everything; about ten seconds."""
    made = place_paper_base(folder)
    write_base(folder / "plain")
    put_in_cache(folder / "plain", made.snapshot)
    write_words(made.cache / "embeddings")
    write_resnet18(made.torch_home / "hub" / "checkpoints")
    write_data(made, folder / "raw")
    return made


# --------------------------------------------------------------------------- the base


def write_base(folder: Path, *, seed: int = 0) -> None:
    """Write the base in diffusers' layout; its U-Net returns noise, its VAE what it was given."""
    kind = json.loads(json.dumps(read_architectures()["sd2"]))
    kind["vae"] |= {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 1}
    kind["unet"] |= {
        "sample_size": SIZE // 8, "block_out_channels": [20, 40, 80, 80], "norm_num_groups": 4,
        "attention_head_dim": [1, 2, 4, 4],
    }  # fmt: skip
    words = _list_words()
    kind["text_encoder"] |= {
        "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": len(words),
        "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, unet, text_encoder = (network.eval() for network in build_networks(kind))
        _fit_unet(unet, kind["unet"]["cross_attention_dim"])
        _fit_vae(vae)
    for network, part in ((vae, "vae"), (unet, "unet")):
        network.save_pretrained(folder / part)
    text_encoder.save_pretrained(folder / "text_encoder")
    # transformers wrote this prefix until 5.6, and the numbers of positions
    tensors = {
        f"text_model.{k.removeprefix('text_model.')}": v
        for k, v in text_encoder.state_dict().items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder / "tokenizer", words)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_json(folder / "model_index.json", _INDEX)
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", {"size": 224})


def put_in_cache(folder: Path, snapshot: Path) -> None:
    """Move a folder into the hub's cache as its client lays it out: blobs, links, a reference."""
    root = snapshot.parent.parent
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder)
        blob = root / "blobs" / str(name).replace("/", "_")
        for place in (blob, snapshot / name, root / "refs" / "main"):
            place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        (snapshot / name).symlink_to(blob)
    (root / "refs" / "main").write_text(snapshot.name)
    shutil.rmtree(folder)


def _solve(rows: torch.Tensor, wanted: torch.Tensor, layer: Any) -> None:
    """Give a last 3 x 3 convolution the weights that best turn `rows` into `wanted`."""
    rows = torch.nn.functional.unfold(rows, 3, padding=1).mT.flatten(0, 1).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    wanted = wanted.permute(0, 2, 3, 1).flatten(0, 2).double()
    solution = torch.linalg.lstsq(rows, wanted).solution.float()
    layer.weight.copy_(solution[:-1].T.reshape(layer.weight.shape))
    layer.bias.copy_(solution[-1])


@torch.no_grad()
def _fit_unet(unet: Any, width: int) -> None:
    """Fit the last layer to guess the noise, most of all the highest."""
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")):  # small changes to what a block is given
            module.weight.mul_(0.1)
            module.bias.mul_(0.1)
    unet.conv_in.bias.copy_(torch.tensor([2.0, -2.0]).repeat_interleave(10))  # as in `_fit_vae`
    seen: list[torch.Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    noise = torch.randn(48, 4, 8, 8)
    t = torch.cat([torch.full((24,), 999), torch.linspace(0, 998, 24).long()])
    alphas = noise_schedule()[t][:, None, None, None]
    images = torch.nn.functional.interpolate(torch.randn(48, 4, 3, 3), size=8, mode="bilinear")
    x = alphas.sqrt() * images + (1 - alphas).sqrt() * noise
    unet(x, t, encoder_hidden_states=torch.randn(48, 77, width))
    hook.remove()
    _solve(seen[0], noise, unet.conv_out)


@torch.no_grad()
def _fit_vae(vae: Any) -> None:
    """Make the VAE shrink images eightfold and enlarge them again, by its first and last layers."""
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):  # residual blocks and attention return their input
            module.weight.zero_()
            module.bias.zero_()
        elif name.endswith(("conv_shortcut", "quant_conv")):
            _pass_on(module, torch.ones(1, 1))
        elif "downsamplers" in name and name.endswith("conv"):  # the mean of 2 x 2
            _pass_on(module, torch.tensor([1.0, 1, 0])[:, None] * torch.tensor([1.0, 1, 0]) / 4)
        elif "upsamplers" in name and name.endswith("conv"):
            _pass_on(module, torch.tensor([0.1, 0.8, 0.1])[:, None] * torch.tensor([0.1, 0.8, 0.1]))
        elif name in ("encoder.conv_in", "decoder.conv_in"):
            module.weight.zero_()
            gain = 0.3 if name.startswith("encoder") else 0.075 * vae.config.scaling_factor
            for i in range(len(module.bias)):
                # constants keep the brightness, which the norm before the last layer would take out
                module.bias[i] = 2 if i % 8 < 4 else -2
                if i % 8 < module.weight.shape[1]:
                    module.weight[i, i % 8, 1, 1] = gain
    images = torch.cat([
        make_phantoms(kind, "healthy" if kind != "histology" else "normal", 16, size=SIZE).images
        for kind in ("prostate", "chest", "histology")
    ]) / 127.5 - 1  # fmt: skip
    small = torch.nn.functional.interpolate(images, size=SIZE // 8, mode="area")
    small += 0.4 * (small - torch.nn.functional.avg_pool2d(small, 3, 1, 1, count_include_pad=False))
    latents = 4 * torch.cat([small, small.mean(1, keepdim=True)], 1) / vae.config.scaling_factor
    posterior = torch.cat([latents, torch.full_like(latents, -10)], 1)  # mean, log variance
    for coder, source, wanted in (
        (vae.encoder, images, posterior), (vae.decoder, latents, images),
    ):  # fmt: skip
        seen: list[torch.Tensor] = []
        hook = coder.conv_out.register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
        coder(source)
        hook.remove()
        _solve(seen[0], wanted, coder.conv_out)


def _pass_on(layer: Any, kernel: torch.Tensor) -> None:
    """Let a convolution pass each channel on through one kernel."""
    layer.weight.zero_()
    layer.bias.zero_()
    out, inside = layer.weight.shape[:2]
    for i in range(max(out, inside)):
        layer.weight[i % out, i % inside] += kernel * min(1, out / inside)


def _list_words() -> list[str]:
    """Return the beginning of CLIP's vocabulary, with its special words at the end."""
    with gzip.open(SD / "clip_bpe_merges.txt.gz", "rt", encoding="utf-8") as file:
        merges = [line.split() for line in file][:MERGES]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    return [*words, "<|startoftext|>", "<|endoftext|>"]


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    with gzip.open(SD / "clip_bpe_merges.txt.gz", "rt", encoding="utf-8") as file:
        merges = [line.rstrip("\n") for line in file][:MERGES]
    _write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!",
        "unk_token": "<|endoftext|>",
    }  # fmt: skip
    _write_json(folder / "special_tokens_map.json", special)
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


# --------------------------------------------------------------------------- what lies beside it


def write_words(folder: Path) -> None:
    """Write the authors' eight embeddings: their names, shape, steps and checkpoint."""
    folder.mkdir(parents=True)
    for seed, known in enumerate(PAPER_EMBEDDINGS):
        vectors = torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed))
        word = Embedding(
            vectors, f"<{known.name}>", step=known.steps, base="512-base-ema",
            base_hash=PAPER_CHECKPOINT,
        )  # fmt: skip
        word.save(folder / f"{known.name}.pt")


def write_resnet18(folder: Path) -> None:
    """Write random weights where torch hub keeps those of ResNet-18."""
    from torchvision.models import resnet18

    from medbudget.networks import RESNET18_URL

    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(resnet18(weights=None).state_dict(), folder / Path(RESNET18_URL).name)


def write_data(made: PaperBase, raw: Path) -> None:
    """Write phantoms as the public data sets, and prepare them as a user does."""
    few: dict[str, Any] = {"size": SIZE, "per_class": 4, "reference": 8, "allow_fewer": True}
    picai.prepare_picai(
        *layouts.write_picai(raw / "picai", n=40, pixels=32, slices=3),
        made.data / "prostate", **few,
    )  # fmt: skip
    chexpert.prepare_chexpert(
        layouts.write_chexpert(raw, 20, pixels=48), made.data / "chest", **few
    )
    layouts.write_pcam(made.pcam, {"train": 24, "valid": 24, "test": 24})
    pcam.prepare_pcam(made.pcam, made.data / "histology", **few)
    for label in ("healthy", "tumour"):
        images = make_phantoms("prostate", label, 20, size=SIZE, seed=5).images
        save_images(images, raw / "clinic" / label)
        if label == "tumour":
            save_images(images, made.images)
    prepare_folder(raw / "clinic", made.data / "own", size=SIZE)
    shutil.rmtree(raw)
