"""Adapters: files, what they do to a base, and how prompts choose them."""

import json
import random
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from medbudget import (
    Adapter,
    Embedding,
    inpaint,
    interpolate,
    load_base,
    make_phantoms,
    parse_prompt,
    sample,
)
from medbudget.adapter_files import AdapterError
from medbudget.adapters import adapt, compute_change, load_adapters
from medbudget.embeddings import EmbeddingError
from medbudget.loading import hash_weights

LAYERS = {  # of tiny: (out, in)
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q": (144, 144),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (144, 96),
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0": (112, 112),
}
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
FEW = {"n": 2, "steps": 3}


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


def weight(base, name=QUERY):
    return base.unet.get_submodule(name).weight


def test_a_change_of_rank_one_is_the_product_computed_by_hand(tiny):
    down, up = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[2.0], [0.5]])
    change = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(0.5)}
    assert compute_change(change)["weight"].tolist() == [[1, -2, 3], [0.25, -0.5, 0.75]]
    adapter = make(rank=1)
    layer = next(iter(LAYERS))
    a, b = (adapter.tensors[f"{layer}.lora_{part}.weight"] for part in ("down", "up"))
    by_hand = torch.tensor([[float(x) * float(y) for y in a[0]] for x in b[:, 0]])
    moved = weight(adapt(tiny, [adapter.weighted(0.5)])) - weight(tiny)
    torch.testing.assert_close(moved, 0.5 * by_hand, rtol=1e-4, atol=1e-6)


def test_without_alpha_it_is_the_rank_and_a_convolution_is_flattened():
    change = {"lora_down.weight": torch.ones(3, 2, 1, 1), "lora_up.weight": torch.ones(4, 3, 1, 1)}
    assert compute_change(change)["weight"].unique().tolist() == [3]
    change["alpha"] = torch.tensor(1.0)
    assert compute_change(change)["weight"].unique().tolist() == [1]
    assert compute_change({"diff": torch.ones(2), "diff_b": torch.zeros(2)}).keys() == {
        "weight", "bias",
    }  # fmt: skip


def test_weight_zero_draws_the_bases_images_to_the_byte(tiny):
    plain = sample(tiny, "red ellipse", **FEW)
    assert sample(tiny, "red ellipse", adapters=make().weighted(0), **FEW).equal(plain)
    tuned = sample(tiny, "red ellipse", adapters=make(), **FEW)
    assert not tuned.equal(plain)
    half, minus = (
        sample(tiny, "red ellipse", adapters=make().weighted(w), **FEW) for w in (0.5, -1)
    )
    assert not half.equal(tuned) and not half.equal(plain) and not minus.equal(tuned)


def test_the_base_is_never_changed_and_its_other_weights_are_shared(tiny):
    modules = (tiny.vae, tiny.unet, tiny.text_encoder)
    adapted = adapt(tiny, [make()])
    assert hash_weights(*modules) == tiny.hash
    own = {id(p) for p in tiny.unet.parameters()}
    assert sum(id(p) not in own for p in adapted.unet.parameters()) == len(LAYERS)
    assert adapted.vae is tiny.vae and adapted.text_encoder is tiny.text_encoder
    assert adapt(tiny, []) is tiny


def test_adapters_add_up(tiny):
    a, b = make(seed=1), make(seed=2)
    both = weight(adapt(tiny, [a, b.weighted(0.5)])) - weight(tiny)
    one = weight(adapt(tiny, [a])) - weight(tiny)
    other = weight(adapt(tiny, [b])) - weight(tiny)
    torch.testing.assert_close(both, one + 0.5 * other, rtol=1e-4, atol=1e-5)


def test_two_threads_draw_with_different_adapters_from_one_base(tiny):
    adapters = [make(seed=k) for k in range(2)]
    alone = [sample(tiny, "red ellipse", adapters=a, **FEW) for a in adapters]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def draw(k):
        for _ in range(3):
            results[k].append(sample(tiny, "red ellipse", adapters=adapters[k], **FEW))

    threads = [threading.Thread(target=draw, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert len(results[k]) == 3 and all(images.equal(alone[k]) for images in results[k])


# ------------------------------------------------------------------------------------- prompts


def test_a_part_has_the_adapters_that_it_names(tiny):
    """AND by hand: each part's prediction from a base of its own, the unconditional from the plain."""
    from medbudget.sampling import Condition, guide

    a, b, everywhere = make(token="<a>", seed=1), make(token="<b>", seed=2), make(seed=3)
    prompt = "<a>:0.7 AND <b>:0.5 AND red ellipse:0.2"
    x = torch.randn(2, *tiny.latent_shape(), generator=torch.Generator().manual_seed(0))
    t, sigma = torch.tensor(500.0), 2.0
    for common in ([], [everywhere]):
        adapters = [a, b, *common]
        condition = Condition.encode(tiny, prompt, (), "", 2.0, adapters)
        got = condition.denoise(tiny, x, sigma, t)

        def predict(text, used, common=common):
            base = adapt(tiny, [*used, *common])
            context = tiny.text(text, embeddings=[a.word, b.word]).expand(2, -1, -1)
            eps = base.predict_noise(x / (sigma**2 + 1) ** 0.5, t.expand(2), context)
            return x - sigma * eps

        texts = [("<a>", [a]), ("<b>", [b]), ("red ellipse", [])]
        parts = [predict(text, used) for text, used in texts]
        weights = [w for _, w in parse_prompt(prompt)]
        wanted = guide(predict("", []), parts, weights, 2.0)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_negative_text_has_what_all_parts_have(tiny):
    from medbudget.sampling import Condition

    a, b = make(token="<a>", seed=1), make(token="<b>", seed=2)
    alone = Condition.encode(tiny, "<a> on red ground", (), "", 2.0, a)
    assert alone.tuned[0] is alone.tuned[1] is not None
    both = Condition.encode(tiny, "<a> AND <b>:0", (), "", 2.0, [a, b])
    assert len(both.tuned) == 2 and both.tuned[0] is not None and both.tuned[1] is None


def test_words_of_adapters_need_no_loading_and_must_differ(tiny):
    adapter = make(token="<a>")
    images = sample(tiny, "<a>", adapters=adapter, **FEW)
    same = sample(tiny, "<a>", embeddings=adapter.word, adapters=replace(adapter, word=None), **FEW)
    assert images.equal(same)
    with pytest.raises(ValueError, match="two embeddings are called <a>"):
        sample(tiny, "<a>", adapters=adapter, embeddings=make(token="<a>", seed=4).word, **FEW)
    with pytest.warns(UserWarning, match="does not use <a>"):
        sample(tiny, "red", adapters=adapter, **FEW)
    assert adapter.renamed("<b>").token == "<b>"
    with pytest.raises(AdapterError, match="no token to rename"):
        make().renamed("<b>")


def test_inpainting_takes_adapters(tiny):
    image = make_phantoms("prostate", "healthy", 1).images
    mask = torch.zeros(64, 64)
    mask[24:40, 24:40] = 1
    plain = inpaint(tiny, image, mask, "red ellipse", steps=3)
    tuned = inpaint(tiny, image, mask, "red ellipse", steps=3, adapters=make(scale=1))
    assert not tuned.equal(plain) and tuned[..., :10, :].equal(image[..., :10, :])


def test_the_ends_of_an_axis_may_be_adapters(tiny, tmp_path):
    a, b = make(token="<a>", seed=1), make(token="<b>", seed=2)
    few = {"weights": (0, 0.5, 1), "n": 1, "steps": 2}
    axis = interpolate(tiny, a.save(tmp_path / "a.safetensors"), b, **few)
    prompt = "<a>:0.5 AND <b>:0.5"
    assert axis[0.5].equal(sample(tiny, prompt, adapters=[a, b], n=1, steps=2))
    mixed = interpolate(tiny, a, b, method="vectors", **few)
    assert mixed[0.0].equal(sample(tiny, "<a>", adapters=a, n=1, steps=2))
    assert not mixed[0.5].equal(mixed[0.0]) and not mixed[0.5].equal(mixed[1.0])
    with pytest.raises(AdapterError, match="has no word"):
        interpolate(tiny, a, make(), **few)


# --------------------------------------------------------------------------------------- files


def test_a_file_keeps_everything_and_is_the_same_bytes_again(tmp_path):
    adapter = make(
        token="<a>", step=7, base="tiny", base_hash="abc", data="phantoms",
        record={"settings": {"rank": 2}},
    )  # fmt: skip
    again = Adapter.load(adapter.save(tmp_path / "a.safetensors"))
    assert all(again.tensors[k].equal(v) for k, v in adapter.tensors.items())
    assert len(again.tensors) == len(adapter.tensors) and again.hash == adapter.hash
    assert again.word.vectors.equal(adapter.word.vectors) and again.token == "<a>"
    for key in ("step", "base", "base_hash", "data", "record", "rank"):
        assert getattr(again, key) == getattr(adapter, key)
    one, two = (tmp_path / name for name in ("a.safetensors", "b.safetensors"))
    assert again.save(two).read_bytes() == one.read_bytes()
    with pytest.raises(AdapterError, match=r"ends in \.safetensors"):
        adapter.save(tmp_path / "a.pt")


def test_diffusers_draws_the_same_image(tiny, tmp_path):
    """Our file in diffusers' pipeline: equal to the merged base, and to none of the plain one."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    base = load_base("tiny", device="cpu")  # diffusers changes it
    adapter = make(rank=4, scale=0.1)
    path = adapter.save(tmp_path / "a.safetensors")

    def draw(base, change=lambda pipe: None):
        pipe = StableDiffusionPipeline(
            vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
            unet=base.unet, scheduler=DDIMScheduler(beta_schedule="scaled_linear"),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        change(pipe)
        noise = torch.randn(1, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
        return torch.from_numpy(pipe(
            prompt_embeds=tiny.text("red ellipse"), negative_prompt_embeds=tiny.text(""),
            latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="np",
        ).images)  # fmt: skip

    plain, merged = draw(tiny), draw(adapt(tiny, [adapter]))
    loaded = draw(base, lambda pipe: pipe.load_lora_weights(str(path)))
    torch.testing.assert_close(loaded, merged, rtol=0, atol=1e-3)
    assert (loaded - plain).abs().max() > 0.02


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


@pytest.mark.parametrize("layout", ["peft", "old", "processor"])
def test_layouts_of_diffusers_are_read(tmp_path, layout):
    adapter = make()
    path = tmp_path / "a.safetensors"
    save_file(rename(adapter.tensors, layout), path)
    again = Adapter.load(path)
    for layer, change in again.changes().items():
        ours = compute_change(adapter.changes()[layer])["weight"]
        assert compute_change(change)["weight"].equal(ours)
    assert again.word is None and again.base_hash == "" and len(again.changes()) == 3


def test_the_alpha_in_diffusers_metadata_counts(tmp_path):
    path = tmp_path / "a.safetensors"
    note = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    save_file(rename(make().tensors, "peft"), path, metadata=note)
    layer = next(iter(LAYERS))
    twice = compute_change(Adapter.load(path).changes()[layer])["weight"]
    torch.testing.assert_close(twice, 2 * compute_change(make().changes()[layer])["weight"])
    for broken, message in (("{", "damaged"), ('{"unet.use_dora": true}', "use_dora is True")):
        save_file(rename(make().tensors, "peft"), path, metadata={"lora_adapter_metadata": broken})
        with pytest.raises(AdapterError, match=message):
            Adapter.load(path)


LAYER = next(iter(LAYERS))
DOWN, UP = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"
FOREIGN = {
    "text encoder": ({**make().tensors, "lora_te_x.lora_down.weight": torch.ones(1, 2)}, "text enc"),
    "diffusers' text encoder": ({"text_encoder.x.lora_A.weight": torch.ones(1, 2)}, "text encoder"),
    "SDXL": ({"lora_unet_input_blocks_4.lora_down.weight": torch.ones(1, 2)}, "Diffusion XL"),
    "Flux": ({"transformer.x.lora_A.weight": torch.ones(1, 2)}, "transformer"),
    "base": ({"model.diffusion_model.x": torch.ones(1), "b": torch.ones(1)}, "--base"),
    "embedding": ({"<mine>": torch.ones(1, 96)}, "--embeddings"),
    "A1111's embedding": ({"emb_params": torch.ones(1, 96)}, "--embeddings"),
    "anything": ({"a": torch.ones(1), "b": torch.ones(1)}, "no LoRA of a U-Net; it holds a, b"),
    "LoHa": ({f"{LAYER}.hada_w1_a": torch.ones(1, 2)}, "hada_w1_a: only LoRA"),
    "half": ({DOWN: torch.ones(1, 2)}, "either lora_down and lora_up"),
    "no product": ({DOWN: torch.ones(1, 2), UP: torch.ones(2, 3)}, "make no product"),
    "rank zero": ({DOWN: torch.ones(0, 2), UP: torch.ones(2, 0)}, "make no product"),
    "NaN": ({DOWN: torch.full((1, 2), float("nan")), UP: torch.ones(2, 1)}, "NaN, infinity"),
    "huge": ({DOWN: torch.full((1, 2), 1e5), UP: torch.ones(2, 1)}, "beyond 10,000"),
    "bundle": ({**make().tensors, "bundle_emb.x.y": torch.ones(1)}, "embeddings of their own"),
    "one more": ({**make().tensors, "unet.x": torch.ones(1)}, "unet.x, which is no change"),
    "twice": ({**make().tensors, **rename(make().tensors, "peft")}, "twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_in_words(tmp_path, name):
    tensors, message = FOREIGN[name]
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=f"x.safetensors: .*{message}"):
        Adapter.load(path)


def read_metadata(path, content):
    from safetensors import safe_open

    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_damaged_and_hostile_files_are_refused(tmp_path):
    path = make(token="<a>").save(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"\xff" * 16, b"<!doctype html>", whole[8:]):
        path.write_bytes(content)
        with pytest.raises(AdapterError, match="fetch or train it again"):
            Adapter.load(path)
    about = json.loads(next(iter(read_metadata(path, whole).values())))
    word = about["word"]
    for broken in (
        "[", "[]", {**about, "step": []}, {**about, "weight": 2}, {**about, "word": []},
        *({**about, "word": {**word, **part}} for part in (
            {"vectors": "?"}, {"vectors": "AAA="}, {"width": 7}, {"width": 0}, {"step": "a"}, {"x": 1},
        )),
    ):  # fmt: skip
        note = broken if isinstance(broken, str) else json.dumps(broken)
        save_file(make().tensors, path, metadata={"medbudget": note})
        with pytest.raises(AdapterError, match="damaged"):
            Adapter.load(path)
    with pytest.raises(AdapterError, match="other files can hold code"):
        Adapter.load(path.rename(tmp_path / "a.pt"))
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        Adapter.load(tmp_path / "none.safetensors")


def test_a_file_with_damaged_bytes_is_refused_or_a_whole_adapter(tmp_path):
    path = make(token="<a>").save(tmp_path / "a.safetensors")
    whole, draw = path.read_bytes(), random.Random(0)
    head = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        content[draw.randrange(head)] = draw.randrange(256)
        path.write_bytes(content)
        try:
            assert len(Adapter.load(path).changes()) == 3
        except AdapterError:
            refused += 1
    assert refused > 200


def test_an_adapter_is_no_embedding(tmp_path):
    path = make(token="<a>").save(tmp_path / "a.safetensors")
    with pytest.raises(EmbeddingError, match="--adapter"):
        Embedding.load(path)


def test_another_bases_adapter_is_refused_or_warned_of(tiny, tmp_path):
    wide = dict(make().tensors)
    wide[UP] = torch.zeros(320, 2)
    with pytest.raises(AdapterError, match=r"\(320, 144\), which base tiny has as \(144, 144\)"):
        sample(tiny, "red", adapters=Adapter(wide), **FEW)
    strange = {k.replace("up_blocks_1", "up_blocks_7"): v for k, v in make().tensors.items()}
    with pytest.raises(AdapterError, match=r"up_blocks_7.*which base tiny does not have"):
        load_adapters(tiny, Adapter(strange, base="SD 1.5"))
    for token in ("", "<a>"):
        with pytest.warns(UserWarning, match="made on a base with hash 012345678901"):
            load_adapters(tiny, make(token=token, base_hash="012345678901"))
    narrow = replace(make(), word=Embedding(torch.ones(1, 768), "<a>"))
    with pytest.raises(EmbeddingError, match="width 768"):
        sample(tiny, "<a>", adapters=narrow, **FEW)
    for value in (float("nan"), "1", None):
        with pytest.raises(ValueError, match="an adapter's weight must be"):
            make().weighted(value)
    with pytest.raises(AdapterError, match="no changes"):
        Adapter({})


def test_a_full_change_brings_the_tuned_network(tiny, tmp_path):
    norm = "mid_block.resnets.0.norm1"
    own = tiny.unet.get_submodule(norm)
    name = f"lora_unet_{norm.replace('.', '_')}"
    adapter = Adapter({f"{name}.diff": torch.ones(144), f"{name}.diff_b": torch.full((144,), -2.0)})
    path = adapter.save(tmp_path / "a.safetensors")
    assert Adapter.load(path).rank == "full" and len(load_file(path)) == 2
    tuned = adapt(tiny, [Adapter.load(path).weighted(0.5)]).unet.get_submodule(norm)
    torch.testing.assert_close(tuned.weight, own.weight + 0.5)
    torch.testing.assert_close(tuned.bias, own.bias - 1)
