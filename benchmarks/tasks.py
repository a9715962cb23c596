"""Run the examples of docs/tasks.md over seeds: their results as JSON, and a picture of the last run of each.

Example::

    OMP_NUM_THREADS=1 python benchmarks/tasks.py --seeds 0,1,2 --output benchmarks/results/2026-11-29-tasks.json
    python benchmarks/tasks.py --table benchmarks/results/2026-11-29-tasks.json
"""

import argparse
import json
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from bonn_qat.environment import environment, processor
from bonn_qat.plotting import PALETTE

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"float": "float", "xnor": "XNOR-Net", "bonn": "BONN"}


def main() -> None:
    """Run, and write the JSON anew after each run; or print the table of such a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(PICTURES))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pictures", type=Path, help="a folder; by default none is drawn")
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())["runs"]))
        return
    runs: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        for task in args.tasks.split(","):
            sys.argv = [f"examples/{task}.py", "--seed", str(seed)]
            start = time.process_time()
            made = runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
            seconds = round(time.process_time() - start, 1)
            runs.append({"task": task, "seed": seed, "cpu_seconds": seconds, "results": made["results"]})
            if args.output:
                machine = {"processor": processor(), **environment(torch.device("cpu"))}
                content = {"command": "python benchmarks/tasks.py", "environment": machine, "runs": runs}
                args.output.write_text(json.dumps(content, indent=1) + "\n")
            if args.pictures:
                draw(task, made, args.pictures)


def table(runs: list[dict[str, Any]]) -> str:
    """Rows of Markdown: the metric of each scheme, mean ± std over the seeds; sizes; medians of the latencies."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        found = [run["results"] for run in runs if run["task"] == task]
        metric, unit = next(iter(found[0]["float"])).rsplit(" ", 1)
        cells = [task, f"{metric}, {unit}", str(len(found))]
        for scheme in TITLES:
            values = [each[scheme][f"{metric} {unit}"] for each in found]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        cells.append(" / ".join(f"{found[0][scheme]['Mbit']:.2f}" for scheme in TITLES))
        times = [("xnor", "onnxruntime float ms"), ("xnor", "packed ms"), ("bonn", "packed ms")]
        cells += [f"{statistics.median(each[scheme][name] for each in found):.2f}" for scheme, name in times]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(task: str, made: Mapping[str, Any], folder: Path) -> None:
    """Write the picture of a run, whose names are ``made``, as a PNG."""
    figure = PICTURES[task](made)
    path = folder / f"{task}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256)
    small.save(path, optimize=True)


def _label(made: Mapping[str, Any], scheme: str) -> str:
    name, value = next(iter(made["results"][scheme].items()))
    metric, unit = name.rsplit(" ", 1)
    return f"{TITLES.get(scheme, scheme)}\n{metric} {value:.{1 if unit == '%' else 2}f} {unit}"


def _grid(rows: int, titles: list[str], size: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(
        rows, len(titles), figsize=(size * len(titles), size * rows + 0.5), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure, axes


def _shown(axis: Axes, image: Any) -> None:
    axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())


def _segmentation(made: Mapping[str, Any]) -> Any:
    figure, axes = _grid(4, ["picture", "truth", *(_label(made, scheme) for scheme in TITLES)], 1.5)
    colours = torch.tensor([[0.93, 0.93, 0.93], *(_rgb(c) for c in PALETTE[:3])])
    for row, axis in enumerate(axes):
        _shown(axis[0], made["test_inputs"][row] + 0.5)
        maps = [made["test_targets"], *(made["outputs"][scheme] for scheme in TITLES)]
        for place, found in zip(axis[1:], maps, strict=True):
            _shown(place, colours[found[row]].permute(2, 0, 1))
    return figure


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _detection(made: Mapping[str, Any]) -> Any:
    figure, axes = _grid(4, ["truth", *(_label(made, scheme) for scheme in TITLES)], 1.8)
    for row, axis in enumerate(axes):
        found = [made["truth"][row], *(made["outputs"][scheme][row] for scheme in TITLES)]
        for place, objects in zip(axis, found, strict=True):
            _shown(place, made["test_images"][row] + 0.5)
            scores = objects.get("scores", torch.ones(len(objects["boxes"])))
            for box, label, score in zip(objects["boxes"], objects["labels"], scores, strict=True):
                if score > 0.3:
                    x, y, right, bottom = box.tolist()
                    colour = PALETTE[int(label)]
                    place.add_patch(Rectangle((x, y), right - x, bottom - y, edgecolor=colour, linewidth=2, fill=False))
    return figure


def _super_resolution(made: Mapping[str, Any]) -> Any:
    schemes = ["bicubic", *TITLES]
    figure, axes = _grid(2, ["truth", *(_label(made, scheme) for scheme in schemes)], 1.6)
    for axis, which, (top, left) in zip(axes, (0, 1), ((170, 290), (200, 260)), strict=True):
        part = (slice(top, top + 56), slice(left, left + 56))
        images = [made["test"][which], *(made["outputs"][scheme][which] for scheme in schemes)]
        for place, image in zip(axis, images, strict=True):
            _shown(place, image[0][:, *part])
    return figure


def _text(made: Mapping[str, Any]) -> Any:
    figure, axes = _grid(1, [_label(made, scheme) for scheme in TITLES], 2.6)
    names = made["PACKAGES"]
    for place, scheme in zip(axes[0], TITLES, strict=True):
        pairs = len(names) * made["test_targets"] + made["outputs"][scheme]
        counts = torch.bincount(pairs, minlength=len(names) ** 2).view(len(names), -1)
        place.axis("on")
        place.imshow((counts / counts.sum(1, keepdim=True)).numpy(), cmap="Blues", vmin=0, vmax=1)
        place.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        place.set_yticks(range(len(names)), names if scheme == "float" else [""] * len(names), fontsize=8)
        place.set_xlabel("found", fontsize=9)
    axes[0][0].set_ylabel("truth", fontsize=9)
    return figure


PICTURES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "segmentation": _segmentation,
    "text": _text,
    "super_resolution": _super_resolution,
    "detection": _detection,
}

if __name__ == "__main__":
    main()
