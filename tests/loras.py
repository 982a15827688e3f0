"""Adapters of random numbers for the embedded base, and other programs' names of tensors."""

import torch

from medbudget import Adapter, Embedding

LAYERS = {  # of tiny: (out, in)
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q": (144, 144),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (144, 96),
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0": (112, 112),
}
LAYER = next(iter(LAYERS))
DOWN, UP = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


def make(rank=2, token="", scale=0.3, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (out, into) in LAYERS.items():
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, into, generator=generator)
        tensors[f"{layer}.lora_up.weight"] = scale * torch.randn(out, rank, generator=generator)
        tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    word = None
    if token:
        word = Embedding(torch.randn(2, 96, generator=generator), token)
    return Adapter(tensors, word, **kwargs)


def rename(tensors, layout):
    names = {layer: layer.removeprefix("lora_unet_") for layer in LAYERS}
    dots = {
        "mid_block_attentions_0_transformer_blocks_0_attn2_to_q": QUERY,
        "mid_block_attentions_0_transformer_blocks_0_attn2_to_k": QUERY[:-1] + "k",
        "up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0":
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    }  # fmt: skip
    renamed = {}
    for key, value in tensors.items():
        layer, _, part = key.partition(".")
        if part == "alpha":
            continue
        own = dots[names[layer]]
        if layout == "processor":
            head, _, last = own.removesuffix(".0").rpartition(".")
            own = f"{head}.processor.{last}_lora"
        renamed[f"unet.{own}{layout_part(layout, part)}"] = value
    return renamed


def layout_part(layout, part):
    which = "down" if "down" in part else "up"
    letter = {"down": "A", "up": "B"}[which]
    return {"peft": f".lora_{letter}", "old": f".lora.{which}", "processor": f".{which}"}[
        layout
    ] + ".weight"
