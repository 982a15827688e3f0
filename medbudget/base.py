"""Base: the frozen parts of a Stable Diffusion."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from medbudget.embeddings import Embedding
from medbudget.images import check_images
from medbudget.prompts import TOKEN

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
    prediction : str
        What the U-Net predicts: ``epsilon`` or ``v_prediction``.
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
    prediction: str = "epsilon"
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
        """Return epsilon for latents at timestep t (fractional allowed), float32.

        A U-Net that predicts v = sqrt(a) eps - sqrt(1 - a) z (Salimans and Ho 2022, appendix D)
        is turned into one of epsilon: sqrt(a) v + sqrt(1 - a) z_t.
        """
        if not isinstance(t, torch.Tensor):
            t = torch.tensor(t, dtype=torch.float32)
        t = t.to(self.device)
        predicted = self.unet(x.to(self.dtype), t, encoder_hidden_states=context).sample.float()
        if self.prediction == "epsilon":
            return predicted
        low, high, share = t.floor().long(), t.ceil().long(), t - t.floor()
        # between two timesteps, log sigma is linear (see make_sigmas)
        log_sigma = (1 / self.device_alphas - 1).log() / 2
        sigma = ((1 - share) * log_sigma[low] + share * log_sigma[high]).exp()
        sigma = sigma.view(-1, 1, 1, 1) if sigma.ndim else sigma
        return (predicted + sigma * x.float()) / (sigma**2 + 1).sqrt()

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
                "listed in pretraining.corpus.WORDS",
                stacklevel=4,
            )
        return ids


def _block(size: int) -> int:
    """Images that the VAE handles at once: one from 512 px on, or it would take the most memory."""
    return max(1, min(ENCODE_BLOCK, ENCODE_BLOCK * 128**2 // size**2))


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
