"""Architecture of the embedded base: a Stable Diffusion in small, out of diffusers' own parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pretraining import corpus

LATENTS = 8
WIDTH = 96
N_CELLS, N_GRAINS = 4096, 256
BOS, EOS, PAD, UNKNOWN, BLANK = (
    "<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|unknown|>", "*",
)  # fmt: skip


def build_vae():
    """AutoencoderKL, 64 x 64 px to 8 x 16 x 16 latents (f = 4)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


def build_unet():
    """UNet2DConditionModel with cross-attention at 8 x 8 and below, pooled text on the time."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(64, 112, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=(4, 7, 9),
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )


def build_text_encoder(vocabulary: int):
    """CLIPTextModel: 2 layers, 96 wide, 77 positions; embeddings at std .3 so that places show."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    text = CLIPTextModel(config)
    nn.init.normal_(text.embeddings.token_embedding.weight, std=0.3)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.3)
    return text


class WordMap(nn.Module):
    """The linear maps from a visual word's six numbers to its token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.grain_map = nn.Linear(6, WIDTH)
        self.cell_map = nn.Linear(6, WIDTH)
        for layer in (self.grain_map, self.cell_map):
            nn.init.normal_(layer.weight, std=0.3)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Map ``(B, 60, 6)`` to ``(B, 60, 96)``; the first word is the grain."""
        return torch.cat([self.grain_map(numbers[:, :1]), self.cell_map(numbers[:, 1:])], 1)


@contextmanager
def replaced_rows(text_encoder: Any, rows: torch.Tensor) -> Iterator[None]:
    """Let the text encoder see `rows` ``(B, 77, d)`` in place of its token lookup."""
    embedding = text_encoder.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, inputs, output: rows)
    try:
        yield
    finally:
        hook.remove()


def build_tokenizer():
    """Whole-word tokenizer: special tokens, plain words, then the visual words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [BOS, EOS, PAD, UNKNOWN, BLANK, *corpus.WORDS]
    vocabulary += [f"g{i:04d}" for i in range(N_GRAINS)] + [f"v{i:04d}" for i in range(N_CELLS)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(",", "removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=77,
    )


def build_scheduler():
    """Stable Diffusion's noise schedule (scaled linear, 1000 steps), epsilon prediction."""
    from diffusers import EulerAncestralDiscreteScheduler

    return EulerAncestralDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="linspace",
        steps_offset=0,
    )
