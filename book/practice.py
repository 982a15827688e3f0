"""Read what preparation, machines and the embedded base were measured to do, for the sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wording import read_values

DWI = 2  # the third channel
TABLE1 = {
    "words": 7,
    "images": 11_000,
}  # 13 settings of 1000 images; few steps and no guidance save


def preparation(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return what windows and geometries do to the real prostate study of the tests."""
    values = read_values("prepare_geometry", folders)
    if values["case"] != "real":
        raise ValueError("prepare_geometry was recorded on a phantom; name --data of a real case")
    levels = {f"window.{k}": f"{v[DWI]:.0f}" for k, v in values["gland_level"].items()}
    return levels | {"window.geometry": f"{max(values['geometry_gray_levels']):.1f}".lstrip("0")}


def tiny(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how many of its bars the embedded base meets, and where its words stand."""
    parts = read_values("tiny_base", folders)
    bars = {
        part: [row["met"] for row in rows if "met" in row]
        for part, rows in parts.items()
        if any("met" in row for row in rows)
    }
    every = [met for part in bars.values() for met in part]

    def find(part: str, end: str) -> dict[str, dict[str, Any]]:
        found = {row["name"]: row for row in parts[part] if row["name"].endswith(end)}
        return {name.removesuffix(end).rstrip(": ,"): row for name, row in found.items()}

    def count(rows: dict[str, dict[str, Any]]) -> str:
        return f"{sum(row['met'] for row in rows.values())} of {len(rows)}"

    floor = [row["ratio"] for row in find("inversion", "FD of TI against the floor").values()]
    plain = find("inversion", "FD of TI against plain words")
    beaten = [name for name, row in plain.items() if row["ratio"] < 1]
    histology = {name: row for name, row in plain.items() if name not in beaten}
    near = [
        row["value"] for end in ("precision", "recall") for row in find("inversion", end).values()
    ]
    sharp = [row["value"] for row in find("autoencoder", "PSNR, dB").values()]
    layout = {(r["kind"], r["t"]): r["value"] / r["beside"] for r in parts["limits"]
              if r["distance"] == "layout"}  # fmt: skip
    fd = [r["value"] / r["beside"] for r in parts["limits"]
          if r["distance"] == "FD" and r["t"] == 0]  # fmt: skip
    words = {kind: [layout[kind, 0.0], layout[kind, 999.0]] for kind, _ in layout}
    (thrice,) = (row for row in parts["trends"] if row["name"] == "FD, 64 vectors")
    ends = [thrice["value"] + sign * thrice["half_width"] for sign in (-1, 1)]
    return {
        "tiny.trainings": f"{ends[0]:.0f} to {ends[1]:.0f}",
        "tiny.bars": str(len(every)),
        "tiny.met": str(sum(every)),
        "tiny.missed": str(len(every) - sum(every)),
        "tiny.floor": f"{min(floor):.0f} to {max(floor):.0f}",
        "tiny.words": str(len(plain)),
        "tiny.beaten": str(len(beaten)),
        "tiny.plain": ", ".join(
            f"{row['value']:.0f} against {row['beside']:.0f} ({name})"
            for name, row in histology.items()
        ),
        "tiny.described": count(find("inversion", "FD of TI under the described mean's")),
        "tiny.near": f"{max(near):g}",
        "tiny.psnr": f"{min(sharp):.0f} to {max(sharp):.0f} dB",
        "tiny.decoded": f"{min(fd):.1f} to {max(fd):.0f}",
        **{
            f"tiny.layout.{kind}": f"{low:.1f} to {high:.1f}".replace(".0 ", " ")
            for kind, (low, high) in words.items()
        },
        **{f"tiny.{part}": f"{sum(met)} of {len(met)}" for part, met in bars.items()},
    }


def machines(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return times, and what the trials of reliability counted."""
    gpu = read_values("gpu", folders)
    rows = {(row["name"], row["batch"]): row for row in gpu["rows"] if "ms" in row}
    ms = {name: row["ms"] for (name, batch), row in rows.items() if batch == 1}
    ours, theirs = ms["TI: ours, eager"], ms["TI: diffusers' loop"]
    images = gpu["goals"]["diffusers' pipeline / ours"]["measured"]
    minutes = gpu["goals"]["50,000 steps at batch 1, minutes"]["measured"]
    batch = rows["sampling: ours, eager, a batch of 100 steps", 16]
    image = batch["ms"] / 1000 / 16
    words_h = TABLE1["words"] * minutes / 60
    images_h = TABLE1["images"] * image / 3600
    cpu = read_values("inversion", folders)["rows"]["diffusers' way / ours (goal 1.3)"]
    fuzz = read_values("fuzz", folders)["rows"]
    kills = [
        row for row in read_values("faults", folders)["faults"] if row["fault"].startswith("kill")
    ]
    soak = read_values("soak", folders)["rows"]
    stopped = sum(row[kind] for row in fuzz for kind in ("error", "hang", "crash"))
    return {
        "stylegan3.memory": str(read_values("stylegan3_memory", folders)["gib"]),
        "gpu.device": gpu["device"].replace("NVIDIA ", ""),
        "gpu.minutes": f"{minutes:.1f}",
        "gpu.step": f"{ms['TI: ours, fast (compiled, CUDA graph)']:.0f}",
        "gpu.eager": f"{ours:.0f}",
        "gpu.diffusers": f"{theirs:.0f}",
        "gpu.like": f"{theirs / ours:.2f}",
        "gpu.sampling": f"{abs(1 - images) * 100:.0f} % {'slower' if images < 1 else 'faster'}",
        "gpu.image": f"{image:.2f}",
        "gpu.single": f"{ms['sampling: ours, eager, a batch of 100 steps'] / 1000:.1f}",
        "gpu.training_memory": f"{rows['TI: ours, eager', 1]['peak GiB']:.1f}",
        "gpu.sampling_memory": f"{batch['peak GiB']:.1f}",
        "gpu.words": f"{words_h:.1f}",
        "gpu.images": f"{images_h:.1f}",
        "gpu.table1": f"{words_h + images_h:.1f}",
        "gpu.faster": f"{4 * 60 / minutes:.0f}",  # than the paper's card, by the paper's word
        "cpu.ratio": f"{cpu:.2f}",
        "fuzz.files": f"{sum(row['inputs'] for row in fuzz):,}",
        "fuzz.refused": f"{sum(row['refused'] for row in fuzz):,}",
        "fuzz.stopped": str(stopped or "none"),
        "kills.tried": str(sum(row["tried"] for row in kills)),
        "kills.survived": str(sum(row["survived"] for row in kills)),
        "soak.growth": f"{soak['growth, % (goal: below 5)']:g} %",
    }
