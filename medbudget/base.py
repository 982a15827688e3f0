"""Base: a frozen Stable Diffusion. It encodes images and texts, predicts noise, decodes latents."""

from __future__ import annotations

import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch.func import functional_call

from medbudget.embeddings import Embedding
from medbudget.images import check_images
from medbudget.known import compare_origin
from medbudget.progress import say
from medbudget.prompts import TOKEN

LONG = 300  # steps or images from which compiling pays: it takes about a minute

PIXELS = 16 * 128 * 128  # that the VAE handles at once: 16 images of 128 px, one of 512
LARGEST = 1e4  # that a latent may be; they have a standard deviation near 1
Word: TypeAlias = "Embedding | str | os.PathLike[str]"
Words: TypeAlias = "Word | Iterable[Word]"


class NotFiniteError(RuntimeError):
    """NaN, infinity or absurd numbers where latents or pixels should be."""


@dataclass
class Base:
    """The frozen parts of a Stable Diffusion, all on one device. Threads may share it."""

    name: str  # tiny, sd2, or what it was loaded from
    vae: Any  # diffusers' AutoencoderKL
    unet: Any  # diffusers' UNet2DConditionModel
    text_encoder: Any  # transformers' CLIPTextModel
    tokenizer: Any
    alphas_cumprod: torch.Tensor  # (1000,) float32, the noise schedule on the CPU
    hash: str  # 12 hex digits over all weights as they were stored, read as float16
    preset: str = "paper"  # settings used where none are given: tiny or paper
    prediction: str = "epsilon"  # what the U-Net predicts; or v_prediction
    note: str = ""  # what every figure and score made with this base must say; "" for a real one
    words: dict[str, torch.Tensor] = field(default_factory=dict)  # visual words of tiny
    checkpoint_hash: str = ""  # A1111's old hash of the file, where it came from a single one
    fast: bool = False  # see `speed_up`
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self._table.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the networks."""
        return self._table.dtype

    @property
    def width(self) -> int:
        """Width d of a token embedding: 96 tiny, 768 SD 1.x, 1024 SD 2.x."""
        return self._table.shape[1]

    @cached_property
    def device_alphas(self) -> torch.Tensor:
        """`alphas_cumprod` on the device."""
        return self.alphas_cumprod.to(self.device)

    @property
    def factor(self) -> int:
        """Pixels per latent cell, f."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> int:
        """Pixels of the images that it was trained on."""
        return self.unet.config.sample_size * self.factor

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of a square image of `size` pixels."""
        size = self.size if size is None else size
        step = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if size % step or size < step:
            raise ValueError(
                f"size {size} does not fit base {self.name}: it must be a multiple of {step} "
                f"pixels, e.g. {max(step, round(size / step) * step)}"
            )
        return self.unet.config.in_channels, size // self.factor, size // self.factor

    # ---- images and latents

    @torch.no_grad()
    def encode_posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the scaled latents, each ``(N, c, h, w) float32``."""
        scale = self.vae.config.scaling_factor
        means, stds = [], []
        for part in check_images(images).split(max(1, PIXELS // images[0, 0].numel())):
            posterior = self.vae.encode(part.to(self.device, self.dtype) / 127.5 - 1).latent_dist
            means.append(posterior.mean.float() * scale)
            stds.append(posterior.std.float() * scale)
        return self._check_finite(torch.cat(means), "encoded images"), torch.cat(stds)

    def encode(
        self, images: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Encode ``(N, 3, H, W) uint8`` to latents ``(N, c, H/f, W/f) float32``.

        The posterior mean, or with a CPU `generator` one posterior sample.
        """
        mean, std = self.encode_posterior(images)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``(N, c, h, w)`` to ``(N, 3, h*f, w*f) uint8`` on the CPU.

        NaN or infinity, which would become black images, raise NotFiniteError.
        """
        self._check_finite(latents, "latents")
        out = []
        for part in latents.split(max(1, PIXELS // (latents[0, 0].numel() * self.factor**2))):
            z = (part / self.vae.config.scaling_factor).to(self.device, self.dtype)
            x = self._check_finite(self.vae.decode(z).sample.float(), "decoded images")
            out.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(out)

    def _check_finite(self, values: torch.Tensor, name: str) -> torch.Tensor:
        if not values.abs().max() <= LARGEST:
            found = "NaN or infinity" if not values.isfinite().all() else "numbers beyond any image"
            raise NotFiniteError(
                f"the {name} hold {found} (base {self.name} in {str(self.dtype)[6:]}). Ways out: "
                "in float16, load the base with dtype=torch.bfloat16 or torch.float32; lower the "
                "guidance (cfg_scale, weights of parts and adapters); train with a lower learning "
                "rate; if plain prompts fail too, the base's files are damaged: `medbudget base verify`"
            )
        return values

    def predict_noise(
        self, x: torch.Tensor, t: torch.Tensor | float, context: torch.Tensor
    ) -> torch.Tensor:
        """Return epsilon for latents ``x (N, c, h, w)`` at timestep t (fractions allowed), float32.

        A network that predicts v = sqrt(a) eps - sqrt(1 - a) z (Salimans and Ho 2022, appendix D)
        is turned into one of epsilon: sqrt(a) v + sqrt(1 - a) x.
        """
        if not isinstance(t, torch.Tensor):
            t = torch.tensor(t, dtype=torch.float32)
        t = t.to(self.device)
        predicted = self.unet(x.to(self.dtype), t, encoder_hidden_states=context).sample.float()
        if self.prediction == "epsilon":
            return predicted
        alpha = self._alphas(t).view(-1, *[1] * (x.ndim - 1))
        return alpha.sqrt() * predicted + (1 - alpha).sqrt() * x.float()

    def _alphas(self, t: torch.Tensor) -> torch.Tensor:
        """Return alphas_cumprod at fractional timesteps: log sigma is linear between two."""
        log_sigmas = ((1 - self.device_alphas) / self.device_alphas).log() / 2
        low, high, share = t.floor().long(), t.ceil().long(), t - t.floor()
        sigma = ((1 - share) * log_sigmas[low] + share * log_sigmas[high]).exp()
        return 1 / (sigma**2 + 1)

    # ---- texts

    @property
    def _table(self) -> torch.Tensor:
        """Rows of the vocabulary, ``(49408, d)``."""
        return self.text_encoder.get_input_embeddings().weight

    def text(self, prompt: str | torch.Tensor, *, embeddings: Words = ()) -> torch.Tensor:
        """Encode a prompt, or the bare vectors ``(n, d)`` of Textual Inversion, to ``(1, 77, d)``.

        ``<token>`` in a prompt stands for the loaded embedding of that name. Gradients flow to
        vectors.
        """
        limit = self.text_encoder.config.max_position_embeddings
        tok, words = self.tokenizer, {e.token: e for e in self.load_words(embeddings)}
        with self._lock:  # functional_call swaps a parameter in place: one thread at a time
            table = self._table
            rows = prompt if isinstance(prompt, torch.Tensor) else self._rows(prompt, words)
            if len(rows) > limit - 2:
                raise ValueError(
                    f"the prompt takes {len(rows)} positions, but {limit - 2} fit (an embedding "
                    "takes as many as it has vectors); shorten it, or join parts with AND"
                )
            bos, eos, pad = (
                table[i : i + 1] for i in (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id)
            )
            padding = pad.expand(limit - 2 - len(rows), -1)
            rows = torch.cat([bos, rows.to(table), eos, padding])
            # these rows stand in for the vocabulary, row i at position i
            name = next(n for n, p in self.text_encoder.named_parameters() if p is table)
            ids = torch.arange(limit, device=table.device)[None]
            return functional_call(self.text_encoder, {name: rows}, (ids,)).last_hidden_state

    def _rows(self, prompt: str, words: Mapping[str, Embedding]) -> torch.Tensor:
        """Look up a prompt's rows ``(n, d)``, without beginning, end and padding."""
        parts = [self._table[:0]]
        for piece in re.split(f"({TOKEN.pattern})", prompt):
            if not TOKEN.fullmatch(piece):
                parts.append(self._table[self._tokenize(piece)])
            elif piece in words:
                parts.append(words[piece].vectors.to(self._table))
            else:
                raise ValueError(
                    f"unknown token {piece} in the prompt; loaded are: "
                    f"{', '.join(sorted(words)) or 'none'}"
                )
        return torch.cat(parts)

    def load_words(self, embeddings: Words) -> list[Embedding]:
        """Return embeddings (or those in files) that fit this base, each under a name of its own."""
        if isinstance(embeddings, Embedding | str | os.PathLike):
            embeddings = [embeddings]
        words: dict[str, Embedding] = {}
        for item in embeddings:
            word = item if isinstance(item, Embedding) else Embedding.load(item)
            word.check_fits(self.width, self.name)
            self.check_token(word.token)
            same, reason = compare_origin(word, self)
            if same is False:
                warnings.warn(
                    f"{word.token} was {reason}: images will differ from those it was trained for",
                    stacklevel=4,
                )
            if word.token in words:
                raise ValueError(
                    f"two embeddings are called {word.token}; give one another name: `medbudget "
                    "embedding convert --token`, in Python Embedding.renamed('<other>')"
                )
            words[word.token] = word
        return list(words.values())

    def check_token(self, token: str) -> None:
        """Raise ValueError if `token` already means something in the vocabulary."""
        if token in self.tokenizer.get_vocab():
            raise ValueError(
                f"token {token} is a word of base {self.name}'s vocabulary; choose another name"
            )

    def token_rows(self, text: str) -> torch.Tensor:
        """Return the token embeddings of plain text, ``(n, d) float32`` on the CPU."""
        if not (ids := self._tokenize(text)):
            raise ValueError(f"the init text {text!r} has no words; write e.g. '*'")
        return self.vocabulary()[ids]

    def vocabulary(self) -> torch.Tensor:
        """Return the token embeddings of all words, ``(49408, d) float32`` on the CPU."""
        with self._lock:
            return self._table.detach().float().cpu()

    def _tokenize(self, text: str) -> list[int]:
        if not text.strip():
            return []
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.words and self.tokenizer.unk_token_id in ids:
            known = self.tokenizer.get_vocab()
            unknown = [w for w in text.lower().replace(",", " ").split() if w not in known]
            warnings.warn(
                f"base {self.name} does not know {', '.join(unknown[:5])}; its plain words are "
                "listed in pretraining.corpus.WORDS",
                stacklevel=5,
            )
        return ids


def speed_up(base: Base) -> Base:
    """Return the same base with a compiled U-Net, equal up to rounding.

    The weights are laid out channels-last, in place. On a GPU, `invert` replays its step as a CUDA
    graph.
    """
    if base.fast:
        return base
    base.unet.to(memory_format=torch.channels_last)
    if any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")):
        return replace(base, unet=torch.compile(base.unet), fast=True)
    warnings.warn(
        "no C++ compiler was found: the U-Net is not compiled, only laid out channels-last; "
        "install g++ or set CXX",
        stacklevel=3,
    )
    return replace(base, fast=True)


def choose_speed(base: Base, fast: bool | None, work: int) -> Base:
    """Return the base, compiled if `fast`; with None, on a GPU for `LONG` steps or images (`work`)."""
    if fast is None and base.device.type == "cuda" and work >= LONG and not base.fast:
        say(
            f"the U-Net is compiled first, since {work} steps or images are to come: about a "
            "minute; --no-fast (Python: fast=False) refuses it"
        )
        fast = True
    return speed_up(base) if fast else base
