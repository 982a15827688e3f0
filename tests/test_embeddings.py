import io
import os
import pickle
import pickletools
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from medbudget import Embedding
from medbudget.embeddings import EmbeddingError

VECTORS = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))


def make(**kwargs):
    record = {"settings": {"lr": 0.005}, "history": {"step": [1], "loss": [0.5]}}
    fields = {"step": 7, "base": "sd2", "base_hash": "0123", "data": "ten", "record": record}
    return Embedding(VECTORS, "<x>", **{**fields, **kwargs})


def test_safetensors_keeps_everything_under_one_megabyte(tmp_path):
    path = make().save(tmp_path / "x.safetensors")
    back = Embedding.load(path)
    assert torch.equal(back.vectors, VECTORS)
    assert (back.token, back.step, back.base, back.base_hash, back.data, back.record) == (
        "<x>", 7, "sd2", "0123", "ten", make().record,
    )  # fmt: skip
    assert path.stat().st_size < 2**20
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_other_formats_keep_the_vectors(tmp_path, ending):
    back = Embedding.load(make().save(tmp_path / f"x{ending}"))
    assert torch.equal(back.vectors, VECTORS) and back.token == "<x>"
    assert back.record == (make().record if ending == ".pt" else {})


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_a1111s_check_of_archives_lets_ours_pass(tmp_path, ending):
    """Its modules/safe.py at d050bb7: names of entries, then of what the pickle calls."""
    path = make().save(tmp_path / f"x{ending}")
    allowed = re.compile(r"^([^/]+)/((data/\d+)|version|(data\.pkl))$")
    with zipfile.ZipFile(path) as archive:
        assert all(allowed.match(name) for name in archive.namelist()), archive.namelist()
        assert sorted(n.split("/", 1)[1] for n in archive.namelist()) == [
            "data.pkl", "data/0", "version",
        ]  # fmt: skip
        names = {
            argument
            for op, argument, _ in pickletools.genops(archive.read("archive/data.pkl"))
            if op.name in ("GLOBAL", "STACK_GLOBAL")
        }
    assert names == {
        "collections OrderedDict",
        "torch FloatStorage",
        "torch._utils _rebuild_tensor_v2",
    }
    content = torch.load(path, weights_only=True)
    if ending == ".pt":  # as A1111 reads it
        assert content["string_to_token"] == {"*": 265}
        assert torch.equal(content["string_to_param"]["*"], VECTORS)
        assert (content["name"], content["step"]) == ("x", 7)
    assert path.read_bytes() == make().save(tmp_path / f"y{ending}").read_bytes()


def test_files_of_the_original_repository_are_read(tmp_path):
    """rinongal/textual_inversion stores a ParameterDict, and token numbers as tensors."""
    words = torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS[:3])})
    torch.save(
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": words}, tmp_path / "e.pt"
    )
    back = Embedding.load(tmp_path / "e.pt")
    assert torch.equal(back.vectors, VECTORS[:3]) and back.token == "<e>"


@pytest.mark.parametrize("kind", [np.int64, np.uint16, int])
def test_numpy_scalars_are_read_as_numbers(tmp_path, kind):
    content = {"string_to_param": {"*": VECTORS[:2]}, "name": "n", "step": kind(50_000)}
    torch.save({**content, "loss": np.float64(0.25), "stop": np.bool_(True)}, tmp_path / "e.pt")
    assert Embedding.load(tmp_path / "e.pt").step == 50_000


@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
        (b"\xef\xbb\xbf<HTML><head></head></HTML>", "web page"),
        (b'{"error": "Repository Not Found"}\n', "message of a server .*Repository Not Found"),
        (b"", "empty|whole safetensors"),
    ],
)
def test_what_is_no_embedding_is_called_what_it_is(tmp_path, ending, content, named):
    (tmp_path / f"x{ending}").write_bytes(content)
    with pytest.raises(EmbeddingError, match=named):
        Embedding.load(tmp_path / f"x{ending}")


def test_numbers_that_no_float32_holds_and_later_damage_are_found():
    with pytest.raises(EmbeddingError, match="infinity"):
        Embedding(torch.full((1, 4), 1e300, dtype=torch.float64), "<x>")
    word = Embedding(VECTORS.clone(), "<x>")
    word.vectors[2, 3] = float("nan")
    with pytest.raises(
        EmbeddingError, match=r"<x> holds NaN, infinity or numbers beyond 10000 in vectors \[2\]"
    ):
        word.check_fits(1024, "sd2")


def test_a1111_safetensors_take_their_token_from_the_file_name(tmp_path):
    save_file({"emb_params": VECTORS}, tmp_path / "my words.safetensors")
    assert Embedding.load(tmp_path / "my words.safetensors").token == "<my-words>"


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["chexpert_healthy", "prostate_neg"])
def test_the_authors_files(real_data, tmp_path, name):
    e = Embedding.load(real_data / "embeddings" / f"{name}.pt")
    assert e.vectors.shape == (64, 1024) and e.base_hash == "09dd2ae4"
    assert e.step == (100_000 if name == "prostate_neg" else e.step) and e.step >= 49_999
    # facts: mean row norm about 52 after 100k steps, 37 after 50k
    expected = 52 if name == "prostate_neg" else 37
    assert abs(e.vectors.norm(dim=1).mean() - expected) < 5
    again = Embedding.load(e.save(tmp_path / "again.pt"))
    assert torch.equal(again.vectors, e.vectors) and again.step == e.step


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_diffusers_reads_our_files(tiny, tmp_path, ending):
    from diffusers import StableDiffusionPipeline

    from medbudget.loading import TINY

    vectors = torch.randn(3, 96)
    path = Embedding(vectors, "<mine>").save(tmp_path / f"mine{ending}")
    pipe = StableDiffusionPipeline.from_pretrained(
        TINY, safety_checker=None, torch_dtype=torch.float32
    )
    pipe.load_textual_inversion(path)
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("<mine>", pipe.tokenizer))["input_ids"]
    rows = pipe.text_encoder.get_input_embeddings().weight[ids[1:-1]].float()
    assert torch.equal(rows, vectors)


@pytest.mark.parametrize(
    ("vectors", "problem"),
    [
        (torch.full((2, 4), float("nan")), "NaN"),
        (torch.zeros(2, 4), "all zero"),
        (torch.ones(75, 4), "at most 74"),
        (torch.ones(4), r"shape \(n, d\)"),
        (torch.ones(0, 4), r"shape \(n, d\)"),
        (torch.ones(1, 4, dtype=torch.long), "integers"),
    ],
)
def test_broken_vectors_are_refused(vectors, problem):
    with pytest.raises(EmbeddingError, match=problem):
        Embedding(vectors, "<x>")


@pytest.mark.parametrize("token", ["x", "<a b>", "<a/b>", "<>", "<../x>", ""])
def test_tokens_have_brackets_and_no_path_in_them(token):
    with pytest.raises(EmbeddingError, match="angle brackets"):
        Embedding(torch.ones(1, 4), token)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"string_to_param": {"*": Bomb()}}, tmp_path / "bomb.pt")
    with pytest.raises(EmbeddingError, match="never run"):
        Embedding.load(tmp_path / "bomb.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(EmbeddingError):
        Embedding.load(tmp_path / "plain.bin")
    assert not (tmp_path / "ran").exists()


def test_complex_vectors_lose_no_part_in_silence(tmp_path):
    torch.save({"<x>": torch.ones(2, 96, dtype=torch.complex64)}, tmp_path / "x.bin")
    with pytest.raises(EmbeddingError, match="must be real numbers, got"):
        Embedding.load(tmp_path / "x.bin")


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused(tmp_path, ending):
    path = make().save(tmp_path / f"x{ending}")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(EmbeddingError, match="again"):
        Embedding.load(path)


def test_an_archive_bomb_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 50_000_000)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    with pytest.raises(EmbeddingError, match="bomb"):
        Embedding.load(tmp_path / "x.pt")


def test_several_tensors_or_an_unknown_ending_are_no_embedding(tmp_path):
    save_file({"a": VECTORS, "b": VECTORS.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(EmbeddingError, match="one token"):
        Embedding.load(tmp_path / "model.safetensors")
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(EmbeddingError, match=r"\.safetensors, \.pt, \.bin"):
        Embedding.load(tmp_path / "x.ckpt")
    with pytest.raises(EmbeddingError, match="allowed endings"):
        make().save(tmp_path / "y.txt")
    with pytest.raises(FileNotFoundError):
        Embedding.load(tmp_path / "none.pt")


def test_width_mismatch_names_both_models():
    with pytest.raises(EmbeddingError, match=r"width 1024.*tiny \(96\).*SD 2\.x.*tiny embedding"):
        make().check_fits(96, "tiny")


def test_equal_embeddings_are_equal_files(tmp_path):
    e = Embedding(torch.ones(2, 3), "<x>", step=3, base="tiny", base_hash="ab", record={"a": 1})
    files = [e.save(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)]
    assert len(set(files)) == 1


@pytest.mark.realdata
def test_the_authors_files_compose_on_a_base_of_their_width(real_data, tiny):
    """Shapes only: random weights of Stable Diffusion 2's width, tiny's tokenizer and autoencoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from medbudget import sample

    torch.manual_seed(0)
    config = type(tiny.text_encoder.config)(
        **(tiny.text_encoder.config.to_dict() | {"hidden_size": 1024, "num_attention_heads": 16})
    )
    unet = UNet2DConditionModel.from_config({**tiny.unet.config, "cross_attention_dim": 1024})
    base = replace(tiny, text_encoder=CLIPTextModel(config).eval(), unet=unet.eval())
    names = {"<healthy>": "chexpert_healthy", "<prostate>": "prostate_neg"}
    words = [
        Embedding.load(real_data / "embeddings" / f"{file}.pt", token=token)
        for token, file in names.items()
    ]
    draw = {"embeddings": words, "n": 1, "steps": 3}
    states = [base.text(token, embeddings=words) for token in names]
    assert states[0].shape == (1, 77, 1024) and not torch.allclose(*states)
    mixed = sample(base, "<healthy>:0.25 AND <prostate>:0.75", **draw)
    alone, twice = (
        sample(base, p, **draw) for p in ("<healthy>", "<healthy>:0.5 AND <healthy>:0.5")
    )
    assert mixed.shape == (1, 3, 64, 64) and not torch.equal(mixed, alone)
    assert (alone.int() - twice.int()).abs().max() <= 1
    with pytest.raises(ValueError, match=r"width 1024.*tiny \(96\).*SD 2"):
        sample(tiny, "<healthy>", embeddings=words, n=1, steps=1)
