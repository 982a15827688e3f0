"""Adapters: what they do to a base, and how prompts choose them."""

import threading
from dataclasses import replace

import pytest
import torch
from loras import LAYERS, QUERY, UP, make
from safetensors.torch import load_file

from medbudget import (
    Adapter,
    Embedding,
    inpaint,
    interpolate,
    make_phantoms,
    parse_prompt,
    sample,
    sample_to,
)
from medbudget.adapter_files import AdapterError
from medbudget.adapters import adapt, compute_change, load_adapters
from medbudget.embeddings import EmbeddingError
from medbudget.loading import hash_weights

FEW = {"n": 2, "steps": 3}


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


def test_a_base_with_changes_is_another_one(tiny, tmp_path):
    hashes = {
        adapt(tiny, adapters).hash
        for adapters in ([], [make()], [make().weighted(0.5)], [make(seed=1)], [make(), make()])
    }
    assert len(hashes) == 5 and tiny.hash in hashes
    sample_to(tmp_path, tiny, "red ellipse", n=1, steps=1)
    with pytest.raises(FileExistsError, match="base_hash"):
        sample_to(tmp_path, adapt(tiny, [make()]), "red ellipse", n=1, steps=1)
    sample_to(tmp_path, tiny, "red ellipse", n=1, steps=1)


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
    from medbudget.sampling.sampler import Condition, guide

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
    from medbudget.sampling.sampler import Condition

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


# -------------------------------------------------------------------------------------- layers


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
    with pytest.raises(AdapterError, match="holds int in diff"):
        Adapter({"lora_unet_conv_in.diff": 5})
    for wrong in (narrow.word, None, [None], 5):
        with pytest.raises(TypeError):
            sample(tiny, "red", adapters=wrong, **FEW)


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
