"""medbudget embedding and embeddings: look into files, convert, describe and share them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cyclopts import App

from medbudget.cli.options import File, Licence, Overwrite, ScoresFile, Text, Words, check_free

app = App(
    name="embedding",
    help="Look into an embedding's or adapter's file, convert, describe, upload it.",
)
released_app = App(name="embeddings", help="Embeddings that others released.")


@app.command
def show(file: File, /, *, base: Text | None = None) -> None:
    """Print token, shape, steps, norms and base of an embedding file, or of an adapter's.

    Args:
        base: check that it fits this base
    """
    from medbudget.adapters import Adapter, load_adapters
    from medbudget.known import compare_origin
    from medbudget.loading import load_base
    from medbudget.sampling.composition import read_end

    e = read_end(file)
    word = e.word if isinstance(e, Adapter) else e
    rows = {"token": e.token or "none: it applies to all parts of a prompt"}
    if isinstance(e, Adapter):
        rows["changes"] = f"rank {e.rank}, {len(e.changes())} layers of the U-Net"
    if word is not None:
        norms = word.vectors.norm(dim=1)
        rows["shape"] = f"{tuple(word.vectors.shape)} (vectors, width)"
        rows["norms"] = f"mean {norms.mean():.2f}, {norms.min():.2f} to {norms.max():.2f}"
    rows["step"] = str(e.step)
    rows["base"] = f"{e.base or 'unknown'} (hash {e.base_hash or 'unknown'})"
    rows["data"] = e.data or "unknown"
    rows["file"] = f"{file.stat().st_size / 1024:.0f} kB"
    for name, value in rows.items():
        print(f"{name:<7} {value}")
    if base is not None:
        loaded = load_base(base)
        if isinstance(e, Adapter):
            load_adapters(loaded, replace(e, base_hash=""))  # what differs is said below
        if word is not None:
            word.check_fits(loaded.width, loaded.name)
        same, reason = compare_origin(e, loaded)
        if same is False:
            print(f"! {reason}: images will differ from those it was trained for")
        else:
            print(f"fits    base {base}: {reason}")


@app.command
def convert(
    file: File, out: Path, /, *, token: Text | None = None, overwrite: Overwrite = False
) -> None:
    """Write an embedding in another program's format, or an adapter under another token.

    Args:
        out: *.safetensors, *.pt (A1111, ComfyUI) or *.bin (diffusers); of an adapter, the last two
            hold its word
        token: give it another token
    """
    from medbudget.adapter_files import AdapterError, is_adapter
    from medbudget.adapters import Adapter
    from medbudget.embeddings import Embedding

    check_free(out, overwrite)
    if is_adapter(file):
        adapter = Adapter.load(file).renamed(token) if token else Adapter.load(file)
        if out.suffix == ".safetensors":
            print(f"wrote {adapter.save(out)}")
            return
        if adapter.word is None:
            raise AdapterError(f"{file.name}: an adapter without a word has none to write")
        e = adapter.word
    else:
        e = Embedding.load(file, token=token)
    e.save(out)
    width = e.vectors.shape[1]
    programs = {768: "1.x", 1024: "2.x"}
    use = "as base tiny needs them: no other program can use it"
    if width in programs:
        use = f"for Stable Diffusion {programs[width]} in A1111, ComfyUI and diffusers"
    print(f"wrote {out}: vectors {width} wide, {use}")


@app.command
def card(
    file: File, /, *, scores: ScoresFile = None, licence: Licence = "other", out: Path | None = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Write the model card of an embedding: data, licence, steps, base, scores, use, limits.

    Args:
        out: write it there; else print it
    """
    from medbudget.embeddings import Embedding
    from medbudget.files import write_text
    from medbudget.hub import make_card, read_scores

    check_free(out, overwrite)
    text = make_card(Embedding.load(file), scores=read_scores(scores), licence=licence)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        print(f"wrote {out}")


@app.command
def push(
    file: File, repo: Text, /, *, scores: ScoresFile = None, licence: Licence = "other",
    public: bool = False,
) -> None:  # fmt: skip
    """Upload an embedding with its card to the Hugging Face hub (after hf auth login).

    Args:
        repo: OWNER/NAME on the Hugging Face hub
        public: else only you can see it
    """
    from medbudget.embeddings import Embedding
    from medbudget.hub import push_embedding, read_scores

    e = Embedding.load(file)
    address = push_embedding(
        e, repo, scores=read_scores(scores), licence=licence, private=not public
    )
    print(f"pushed {e.token} to {address}")


@released_app.command
def paper(*, fetch: Words = None, out: Path = Path("embeddings")) -> None:
    """List the eight embeddings that the paper's authors released, and fetch them on request.

    Args:
        fetch: a name, or all; repeatable
        out: folder for the files
    """
    from medbudget.hub import PAPER_CHECKPOINT, PAPER_EMBEDDINGS, PAPER_URL, fetch_paper_embedding

    if not fetch:
        print(f"{'name':<27}{'steps':>8}  {'SHA-256':<14}draws")
        for e in PAPER_EMBEDDINGS:
            print(f"{e.name:<27}{e.steps:>8,}  {e.sha256[:12]:<14}{e.kind} {e.label}")
        print(
            f"64 vectors of width 1024 each, for Stable Diffusion 2.0 ({PAPER_CHECKPOINT}); MIT. "
            f"From {PAPER_URL}. Get them with --fetch NAME or --fetch all"
        )
        return
    names = [e.name for e in PAPER_EMBEDDINGS] if "all" in fetch else fetch
    for name in names:
        print(f"ready: {fetch_paper_embedding(name, out)}")
