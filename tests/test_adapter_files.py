"""Files of adapters: what is kept, what other programs' files say, and what is refused."""

import json
import random

import pytest
import torch
from loras import DOWN, LAYER, LAYERS, UP, make, rename
from safetensors.torch import load_file, save_file

from medbudget import Adapter, Embedding
from medbudget.adapter_files import AdapterError
from medbudget.adapters import compute_change
from medbudget.embeddings import EmbeddingError


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
    bare = {key.removeprefix("unet."): value for key, value in load_file(path).items()}
    save_file(bare, path)  # as a U-Net's own functions save them
    assert Adapter.load(path).hash == again.hash


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


def test_a_file_of_peft_has_its_scale_beside_it(tmp_path):
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = rename(make().tensors, "peft")
    save_file({key.replace("unet.", "base_model.model."): v for key, v in tensors.items()}, path)
    with pytest.raises(AdapterError, match=r"stands in adapter_config\.json: put that file"):
        Adapter.load(path)
    config.write_text(json.dumps({"r": 2, "lora_alpha": 1, "alpha_pattern": {}}))
    half = compute_change(Adapter.load(path).changes()[LAYER])["weight"]
    torch.testing.assert_close(half, compute_change(make().changes()[LAYER])["weight"] / 2)
    for broken, message in (
        ("[]", "damaged"), ('{"lora_alpha": "much"}', "damaged"), ("[" * 10**5, "damaged"),
        ('{"use_rslora": true}', "use_rslora is True"),
    ):  # fmt: skip
        config.write_text(broken)
        with pytest.raises(AdapterError, match=message):
            Adapter.load(path)


def test_what_a_file_cannot_keep_is_not_saved(tmp_path):
    with pytest.raises(AdapterError, match=r"weight is 0\.5, which a file does not keep"):
        make().weighted(0.5).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    odd = {key: value.t().contiguous().t() for key, value in make().tensors.items()}
    assert not odd[UP].is_contiguous()
    path = Adapter(odd).save(tmp_path / "a.safetensors")
    assert Adapter.load(path).tensors[UP].equal(odd[UP])


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
    "SDXL with its text encoders": (
        {"lora_te1_x.lora_down.weight": torch.ones(1, 2),
         "lora_unet_input_blocks_4.lora_down.weight": torch.ones(1, 2)}, "Diffusion XL"),
    "integers": ({DOWN: torch.ones(1, 2, dtype=torch.int8), UP: torch.ones(2, 1)}, "torch.int8"),
    "truth": ({DOWN: torch.ones(1, 2), UP: torch.ones(2, 1, dtype=torch.bool)}, "torch.bool"),
    "whole numbers": ({f"{LAYER}.diff": torch.ones(2, 2, dtype=torch.int32)}, "torch.int32"),
    "up as large as down": ({DOWN: torch.ones(1, 2), UP: torch.ones(2, 1, 3, 3)}, "make no product"),
    "nothing going in": ({DOWN: torch.ones(1, 0), UP: torch.ones(2, 1)}, "make no product"),
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
        *({**about, "record": {key: 5}} for key in ("image_hashes", "settings", "history")),
        {**about, "word": {**word, "record": {"image_hashes": [1]}}},
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
