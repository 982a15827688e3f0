"""Read NVIDIA's StyleGAN3 files without running what is in them.

An official ``.pkl`` is a pickle that carries Python source and runs it when it is loaded. Here an
unpickler with a short list of what it may name replaces every persistent object by an inert box of
its state; source is never looked at. What comes out are tensors, which are then fitted to our own
networks: names, shapes and filters have to agree. Tested on files of the same structure made by
the tests, not on an official file.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from medbudget.stylegan3.model import StyleGAN3, build_like
from medbudget.stylegan3.networks import Architecture, Discriminator, Generator
from medbudget.torchfiles import Inert, RefusedError, check_instructions, check_tensors, read_torch


class _Box(Inert):
    """The state of an object, also where it is given at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.update(*(a for a in args[:1] if isinstance(a, dict)))


class _Call:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise RefusedError("it changes a function")


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise RefusedError("it holds a tensor without its numbers")
    return torch.empty(0, dtype=storage.dtype).set_(storage, offset, size, stride)


def _read_storage(data: Any) -> Any:
    if not isinstance(data, bytes):
        raise RefusedError("it holds a tensor without its numbers")
    return read_torch(io.BytesIO(data))


def _read_persistent(meta: Any) -> _Box:
    """Stand in for the function that would run the file's source."""
    state = meta.get("state") if isinstance(meta, Mapping) else None
    return _Box(state if isinstance(state, Mapping) else {})


_CORES = ("core", "_core")  # of NumPy 1 and 2
_ALLOWED: dict[str, Any] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _Call(_read_persistent),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild),
    "torch._utils._rebuild_parameter": _Call(lambda data, *rest: data),
    "torch.storage._load_from_bytes": _Call(_read_storage),
    "builtins.set": _Call(lambda *args: set()),
    # settings of a training, which are not needed, are read as boxes
    **dict.fromkeys(("dnnlib.util.EasyDict", "collections.OrderedDict", "numpy.dtype"), _Box),
    **dict.fromkeys(("numpy.ndarray", "torch.Size", "torch.device"), _Box),
    **dict.fromkeys((f"numpy.{core}.multiarray._reconstruct" for core in _CORES), _Box),
    **dict.fromkeys((f"numpy.{core}.multiarray.scalar" for core in _CORES), _Box),
    **{str(t): str(t) for t in (torch.float16, torch.float32, torch.float64, torch.int64)},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise RefusedError(f"it names {module}.{name}, which is not on the list")
        return _ALLOWED[f"{module}.{name}"]


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Return what a pickle holds, executing nothing but the rebuilding of tensors."""
    path = Path(path)
    data = path.read_bytes()
    try:
        check_instructions(io.BytesIO(data))
        return _Unpickler(io.BytesIO(data)).load()
    except RefusedError as reason:
        raise RefusedError(
            f"{path.name} is refused: {reason}. Only tensors and plain containers are read, and "
            "nothing of the file was run"
        ) from None
    except Exception as error:
        what = "it claims more than it holds" if isinstance(error, MemoryError) else f"{error}"
        raise RefusedError(f"{path.name} is no readable pickle ({what[:200]})") from None


def _flatten(module: Any) -> dict[str, torch.Tensor]:
    """Return a module's parameters and buffers by dotted name."""
    found: dict[str, torch.Tensor] = {}
    todo, seen = [("", module)], set()
    while todo:
        prefix, box = todo.pop()
        if id(box) in seen:
            raise RefusedError(f"a module stands in two places, one of them {prefix[:60]!r}")
        seen.add(id(box))
        for group in ("_parameters", "_buffers", "_modules"):
            members = box.get(group) if isinstance(box, Mapping) else None
            for name, value in members.items() if isinstance(members, Mapping) else ():
                if group == "_modules":
                    todo.append((f"{prefix}{name}.", value))
                elif isinstance(value, torch.Tensor):
                    check_tensors([value], value.untyped_storage().nbytes())
                    found[f"{prefix}{name}"] = value.detach().float()
    return found


_GENERATOR = (
    (r"mapping\.fc(\d+)\.(weight|bias)", r"mapping.layers.\1.\2"),
    (r"mapping\.w_avg", "mapping.mean"),
    (r"synthesis\.input\.freqs", "input.frequencies"),
    (r"synthesis\.input\.(phases|weight|affine\.weight|affine\.bias)", r"input.\1"),
    (r"synthesis\.L(\d+)_\d+_\d+\.magnitude_ema", r"layers.\1.magnitude"),
    (r"synthesis\.L(\d+)_\d+_\d+\.(\w+\.)?(weight|bias|up_filter|down_filter)", r"layers.\1.\2\3"),
)
_DISCRIMINATOR = (
    (r"b(\d+)\.fromrgb\.(weight|bias)", r"from_rgb.\2"),
    (r"b(\d+)\.conv0\.(weight|bias)", r"blocks.\1.first.\2"),
    (r"b(\d+)\.conv1\.(weight|bias)", r"blocks.\1.second.\2"),
    (r"b(\d+)\.skip\.weight", r"blocks.\1.skip.weight"),
    (r"b4\.conv\.(weight|bias)", r"last.\1"),
    (r"b4\.fc\.(weight|bias)", r"dense.\1"),
    (r"b4\.out\.(weight|bias)", r"out.\1"),
)
_DERIVED = r"(.*\.)?resample_filter|synthesis\.input\.transform"


def _rename(tensors: Mapping[str, torch.Tensor], rules: Any, what: str) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        if re.fullmatch(_DERIVED, name):
            if name.endswith("transform") and not torch.equal(tensor, torch.eye(3)):
                raise RefusedError(f"{what}: its images are moved by a matrix in {name}")
            continue
        for pattern, ours in rules:
            if match := re.fullmatch(pattern, name):
                renamed[match.expand(ours)] = tensor
                break
        else:
            raise RefusedError(f"{what} has {name}, which no network of configuration T has")
    return renamed


def _fit(kind: Any, architecture: Architecture, found: dict[str, torch.Tensor], what: str) -> Any:
    try:
        network = build_like(kind, architecture, found)
    except ValueError as error:
        raise RefusedError(f"{what}: {error}") from None
    own = network.state_dict()
    if extra := sorted(set(found) - set(own)):
        raise RefusedError(f"{what} has {len(extra)} tensors too many, such as {extra[0]}")
    for name, tensor in found.items():
        if name.endswith("_filter") and not torch.allclose(tensor, own[name], atol=1e-4):
            raise RefusedError(f"{what}: {name} is another filter than configuration T's")
    network.load_state_dict(found)
    return network


def import_official(path: str | os.PathLike[str]) -> StyleGAN3:
    """Read generator (the running mean) and discriminator of an official StyleGAN3-T file.

    Nothing of the file is run: it is a pickle of a mapping with ``G_ema`` and ``D``, as the
    official training writes it. Its weights have a licence of their own: for research only. Other
    networks (configuration R, StyleGAN2, a conditional model) are refused.
    """
    name = Path(path).name
    data = read_pickle(path)
    if not isinstance(data, Mapping) or not {"G_ema", "D"} <= set(data):
        keys = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise RefusedError(f"{name} holds {keys}, not a mapping with G_ema and D")
    g, d = _flatten(data["G_ema"]), _flatten(data["D"])
    layers = {}
    for key, tensor in g.items():
        if match := re.fullmatch(r"synthesis\.L(\d+)_\d+_\d+\.weight", key):
            layers[int(match[1])] = tensor
    sizes = [int(m[1]) for key in d if (m := re.match(r"b(\d+)\.", key))]
    if not layers or not sizes or sorted(layers) != list(range(len(layers))) or len(layers) < 4:
        raise RefusedError(f"{name} holds no synthesis layers, or no discriminator's blocks")
    size, top = max(sizes), max(layers)
    width = g["mapping.w_avg"].numel() if "mapping.w_avg" in g else 512
    widest = max(layer.shape[0] for layer in layers.values())
    try:
        architecture = Architecture(size, layers[top - 1].shape[0] * size, widest, width, top)
    except ValueError as error:
        raise RefusedError(f"{name}: {error}") from None
    rgb = f"layers.{top}."
    found = {
        f"to_rgb.{key.removeprefix(rgb)}" if key.startswith(rgb) else key: tensor
        for key, tensor in _rename(g, _GENERATOR, f"{name}, G_ema").items()
        if key not in (f"{rgb}up_filter", f"{rgb}down_filter")
    }
    generator = _fit(Generator, architecture, found, f"{name}, G_ema")
    blocks = {str(one): i for i, one in enumerate(sorted({*sizes} - {4}, reverse=True))}
    found = {
        re.sub(r"(?<=^blocks\.)\d+", lambda m: str(blocks[m[0]]), key): tensor
        for key, tensor in _rename(d, _DISCRIMINATOR, f"{name}, D").items()
    }
    discriminator = _fit(Discriminator, architecture, found, f"{name}, D")
    return StyleGAN3(generator.eval(), discriminator.eval(), {"data": name})
