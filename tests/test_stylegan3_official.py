"""Official files: their tensors are read, nothing in them runs, and anything else is refused."""

import os
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch

from medbudget.stylegan3 import Architecture, import_official, make_stylegan3
from medbudget.stylegan3.official import RefusedError, read_pickle

SMALL = Architecture(size=32, channel_base=256, channel_max=16, width=8, n_layers=4)


@pytest.fixture
def official(monkeypatch):
    """The modules that official files name, as far as a pickle needs them to be written."""
    util, persistence = types.ModuleType("dnnlib.util"), types.ModuleType("torch_utils.persistence")

    class EasyDict(dict):
        pass

    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    util.EasyDict = EasyDict

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the file's own loader was called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    for module in (util, persistence):
        parent = module.__name__.split(".")[0]
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return types.SimpleNamespace(EasyDict=EasyDict, rebuild=_reconstruct_persistent_obj)


class Persistent:
    """An object that pickles as official networks do: source and state."""

    def __init__(self, official, tensors, source="raise SystemExit('the source was run')"):
        self.official, self.source = official, source
        self.state = {"_parameters": {}, "_buffers": {}, "_modules": {}, "training": False,
                      "_non_persistent_buffers_set": set(), "_init_kwargs": official.EasyDict()}  # fmt: skip
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                below = self.state["_modules"].setdefault(first, {})
                below[rest] = tensor
            elif name.endswith(
                ("filter", "w_avg", "magnitude_ema", "freqs", "phases", "transform")
            ):
                self.state["_buffers"][name] = tensor
            else:
                self.state["_parameters"][name] = torch.nn.Parameter(tensor)
        modules = self.state["_modules"]
        for name, below in modules.items():
            modules[name] = Persistent(official, below, source)

    def __reduce__(self):
        meta = self.official.EasyDict(
            type="class", version=6, module_src=self.source, class_name="N", state=self.state
        )
        return self.official.rebuild, (meta,)


def official_names(model):
    """Our tensors under the names that official files have."""
    a, g, d = model.generator.architecture, {}, {}
    top = a.n_layers
    for key, tensor in model.generator.state_dict().items():
        key = re.sub(r"^mapping\.layers\.(\d)", r"mapping.fc\1", key)
        key = key.replace("mapping.mean", "mapping.w_avg")
        key = re.sub(r"^input\.frequencies", "synthesis.input.freqs", key)
        key = re.sub(r"^input\.", "synthesis.input.", key)
        key = re.sub(r"^layers\.(\d+)\.", r"synthesis.L\1_36_16.", key)
        key = re.sub(r"^to_rgb\.", f"synthesis.L{top}_{a.size}_3.", key)
        g[re.sub(r"\.magnitude$", ".magnitude_ema", key)] = tensor
    for key, tensor in model.discriminator.state_dict().items():
        match = re.match(r"blocks\.(\d+)\.(\w+)\.(.*)", key)
        if match:
            part = {"first": "conv0", "second": "conv1", "skip": "skip"}[match[2]]
            key = f"b{a.size // 2 ** int(match[1])}.{part}.{match[3]}"
        key = re.sub(r"^from_rgb", f"b{a.size}.fromrgb", key)
        key = re.sub(r"^(last|dense|out)", lambda m: "b4." + NAMES[m[1]], key)
        d[key] = tensor
    return g, d


NAMES = {"last": "conv", "dense": "fc", "out": "out"}


def write(path, official, g, d, **more):
    data = official.EasyDict(G_ema=Persistent(official, g), D=Persistent(official, d), **more)
    path.write_bytes(pickle.dumps(data))
    return path


def test_networks_come_back_and_nothing_ran(official, tmp_path):
    model = make_stylegan3(SMALL, seed=3)
    g, d = official_names(model)
    d["b32.resample_filter"] = torch.ones(4)
    g["synthesis.input.transform"] = torch.eye(3)
    extra = {
        "training_set_kwargs": {"n": np.float64(3), "a": np.arange(3), "dtype": torch.float32},
        "augment_pipe": Persistent(official, {"p": torch.tensor(0.2)}),
    }
    path = write(tmp_path / "official.pkl", official, g, d, **extra)
    loaded = import_official(path)
    assert torch.equal(loaded.sample(2), model.sample(2))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.discriminator(images), model.discriminator(images))
    assert loaded.generator.architecture == model.generator.architecture


class Hostile:
    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


def test_a_hostile_file_does_not_run_and_says_what_was_refused(tmp_path, official):
    target = tmp_path / "ran"
    path = tmp_path / "x.pkl"
    command = f"touch {target}"
    for bad, named in (
        (Hostile(os.system, command), r"posix\.system|nt\.system"),
        (Hostile(eval, f"open({str(target)!r}, 'w')"), r"builtins\.eval"),
        (Hostile(getattr, "x", "upper"), r"builtins\.getattr"),
    ):
        path.write_bytes(pickle.dumps({"G_ema": bad, "D": 0}))
        with pytest.raises(RefusedError, match=named):
            import_official(path)
    # by a dotted name, below an allowed module
    path.write_bytes(b"\x80\x04\x8c\x05torch\x8c\x0eos.path.system\x93.")
    with pytest.raises(RefusedError, match=r"torch\.os\.path\.system"):
        read_pickle(path)
    # inside of a tensor's storage, which is a pickle again
    inner = pickle.dumps(Hostile(os.system, command))
    path.write_bytes(pickle.dumps(Hostile(torch.storage._load_from_bytes, inner)))
    with pytest.raises(RefusedError):
        read_pickle(path)
    # by changing a function that is allowed
    head = pickle.dumps(torch._utils._rebuild_tensor_v2)[:-1]
    path.write_bytes(head + pickle.dumps({"__defaults__": ()})[2:-1] + b"b.")
    with pytest.raises(RefusedError):
        read_pickle(path)
    assert not target.exists()


def test_other_networks_are_refused_with_what_differs(official, tmp_path):
    model = make_stylegan3(SMALL)
    g, d = official_names(model)
    path = tmp_path / "x.pkl"

    def refused(g, d, match):
        with pytest.raises(RefusedError, match=match):
            import_official(write(path, official, g, d))

    radial = {
        k: v.expand(12, 12).clone() if k.endswith("L1_36_16.down_filter") else v
        for k, v in g.items()
    }
    refused(radial, d, r"layers\.1\.down_filter is \(12, 12\)")
    blurred = {k: v * 0.9 if k.endswith("L1_36_16.up_filter") else v for k, v in g.items()}
    refused(blurred, d, "another filter")
    lacking = {k: v for k, v in g.items() if not k.endswith("fc1.bias")}
    refused(lacking, d, r"lacks mapping\.layers\.1\.bias")
    refused(g | {"synthesis.input.transform": torch.ones(3, 3)}, d, "moved by a matrix")
    refused(g | {"mapping.embed.weight": torch.ones(1)}, d, r"has mapping\.embed\.weight")
    refused(g, {}, "no discriminator")
    refused({}, d, "no synthesis layers")
    path.write_bytes(pickle.dumps({"G": 1}))
    with pytest.raises(RefusedError, match=r"holds \['G'\]"):
        import_official(path)
    path.write_bytes(b"not a pickle")
    with pytest.raises(RefusedError, match="truncated or no pickle"):
        import_official(path)
