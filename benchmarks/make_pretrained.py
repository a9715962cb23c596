"""Make the files of plugins/bonn-qat-weights from runs of ``bonn-qat compare``, and write their cards and the table.

A run becomes ``MODEL.SCHEME_DATA``. Latent weights of binary layers are rounded to 8-bit floats of the same sign, and
large weights of float networks to float16, so that the files stay small. Accuracies are those of the files as they
are shipped, read back, on the whole test set. ``--again`` measures all shipped files anew, so that latencies are of
one machine; ``--table`` measures nothing and writes cards and table from the files. Examples::

    python benchmarks/make_pretrained.py runs/one runs/two --data-dir data
    python benchmarks/make_pretrained.py --again --data-dir data
    python benchmarks/make_pretrained.py --table
"""

import argparse
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bonn_qat
from bonn_qat.bench import bench
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.environment import processor
from bonn_qat.files.atomic import write_text
from bonn_qat.files.tensors import read_tensors, write_tensors
from bonn_qat.plugins import create_manager, pretrained
from bonn_qat.runtime.packed import PackedModel
from bonn_qat.training.data import Data
from bonn_qat.training.network import float_network
from bonn_qat.training.results import RUNS, read_run

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "plugins" / "bonn-qat-weights"
FILES, PAGE = PLUGIN / "bonn_qat_weights" / "files", ROOT / "docs" / "pretrained.md"
_BEGIN, _END = "<!-- made by benchmarks/make_pretrained.py -->", "<!-- end -->"
_SMALL = 1024  # numbers of a tensor that stays float32


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a reader should know about a trained network; ``top1`` and ``packed_top1`` in percent, of the files."""

    data: str
    test_images: int
    top1: float
    packed_top1: float | None
    bits: str
    title: str
    epochs: int
    lr: float
    seed: int
    hours: float
    commit: str
    torch: str
    trained_on: str
    measured_on: str
    parameters: int
    megabits: float
    milliseconds: float | None
    float_milliseconds: float | None
    teacher: str = ""


def make(directory: Path, data_dir: Path | None, machine: str) -> Iterator[Path]:
    """Make the files of all finished runs in the directory of a comparison; ``machine`` is where they were trained."""
    for path in sorted((directory / RUNS).glob("*.json")):
        run = read_run(path)
        recipe = bonn_qat.Recipe.from_dict(run.recipe)
        data = bonn_qat.load_data(recipe.data, directory=data_dir)
        name = f"{recipe.model}.{recipe.scheme}_{re.sub(r'[^a-z0-9]', '', recipe.data)}"
        tensors, header = rounded(path.with_suffix(".safetensors"))
        target = write_tensors(FILES / f"{name}.safetensors", tensors, header)
        card = Card(
            title=run.title, bits=run.bits, epochs=recipe.epochs, lr=recipe.lr, seed=recipe.seed,
            teacher=recipe.teacher, hours=round(run.seconds / 3600, 2), commit=run.environment["commit"],
            torch=run.environment["torch"],
            trained_on=f"{machine}, threads: {run.environment['threads']}", **measured(target, data),
        )  # fmt: skip
        yield write_tensors(target, tensors, header | {"card": asdict(card)})


def again(data_dir: Path | None) -> Iterator[Path]:
    """Measure all shipped networks, and write what was found into their cards."""
    for name, card in cards().items():
        path = FILES / f"{name}.safetensors"
        tensors, header = rounded(path)
        write_tensors(path, tensors, header)
        fresh = replace(card, **measured(path, bonn_qat.load_data(card.data, directory=data_dir)))
        yield write_tensors(path, tensors, header | {"card": asdict(fresh)})


def rounded(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a weights file, with latent weights in float8, or those of a float network in float16."""
    tensors, header = read_tensors(path)
    latents = {f"{layer}.weight" for layer, _ in binary_layers(bonn_qat.load(path))}
    for name, tensor in tensors.items():
        if name in latents:
            tensors[name] = _float8(tensor)
        elif not latents and tensor.numel() > _SMALL:
            tensors[name] = tensor.half()
    return tensors, header


def _float8(latents: Tensor) -> Tensor:
    """Rounded to two bits of the mantissa, and none of the negative ones to 0, which counts as +1."""
    return torch.where(latents < 0, latents.clamp(max=-(2.0**-16)), latents).to(torch.float8_e5m2)


def measured(path: Path, data: Data) -> dict[str, Any]:
    """Accuracy, size and latency of a weights file; writes the packed file beside it if the network is binary."""
    model = bonn_qat.load(path)
    found = bonn_qat.evaluate(model, data)
    print(f"{path.name}: {found}")
    report = bonn_qat.summary(model, data.image)
    packed_top1, times = None, dict[str, float]()
    if list(binary_layers(model)):
        file = bonn_qat.pack(model).save(path.with_suffix(".packed.safetensors"))
        packed_top1 = round(bonn_qat.evaluate(PackedModel.load(file), data).top1, 2)
        float_form = float_network(model.recipe, data.classes, data.image[0])  # type: ignore[arg-type]
        latencies = bench(float_form, model, data.image, batches=(1,), threads=(1,), rounds=20).latencies
        times = {latency.backend: round(latency.median_milliseconds, 3) for latency in latencies}
    return {
        "data": data.name, "test_images": data.test_size, "top1": round(found.top1, 2), "packed_top1": packed_top1,
        "measured_on": processor(), "parameters": report.parameters, "megabits": round(report.mbit, 3),
        "milliseconds": times.get("packed"), "float_milliseconds": times.get("onnxruntime float"),
    }  # fmt: skip


def cards() -> dict[str, Card]:
    """The cards of all shipped networks by name, the best of each data set first."""
    found = {}
    for name, network in pretrained(create_manager(entry_points=["weights"])).items():
        found[name] = Card(**read_tensors(network.weights)[1]["card"])
    return dict(sorted(found.items(), key=lambda item: (item[1].data, -item[1].top1)))


def write_pages(found: Mapping[str, Card]) -> None:
    """Write a card for each network, the table as CSV, and as Markdown into the documentation."""
    for name, card in found.items():
        write_text(PLUGIN / "cards" / f"{name}.md", page(name, card))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["model", *(field.name for field in fields(Card))])
    rows.writerows([name, *asdict(card).values()] for name, card in found.items())
    write_text(PLUGIN / "results.csv", text.getvalue())
    before, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN, 1)
    write_text(PAGE, f"{before}{_BEGIN}\n{table(found)}{_END}{rest.split(_END, 1)[1]}")


def table(found: Mapping[str, Card]) -> str:
    """The table of the documentation."""
    lines = [
        "| name | bits W/A | data, epochs | top-1 (%) | packed, top-1 (%) | Mbit | packed (ms) | float (ms) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, card in found.items():
        link = f"[`{name}`](../plugins/bonn-qat-weights/cards/{name}.md)"
        numbers = (card.packed_top1, card.milliseconds, card.float_milliseconds)
        packed, own, other = ("" if number is None else f"{number:.2f}" for number in numbers)
        lines.append(
            f"| {link} | {card.bits} | {card.data}, {card.epochs} | {card.top1:.2f} | {packed} | {card.megabits:.2f} | "
            f"{own} | {other} |"
        )
    return "\n".join(lines) + "\n"


def page(name: str, card: Card) -> str:
    """A network's card as Markdown."""
    architecture = name.partition(".")[0]
    is_binary = card.packed_top1 is not None
    lines = [
        f"# {name}", "",
        f"`{architecture}` as {card.title}, {card.bits} bits for weights and activations, trained on {card.data}.", "",
        "```python", "import bonn_qat", "", f'model = bonn_qat.create_model("{name}", pretrained=True).eval()', "```",
        "",
        "| | |", "|---|---|",
        f"| top-1 on all {card.test_images:,} test images | {card.top1:.2f} % |",
        *([f"| the same, packed | {card.packed_top1:.2f} % |"] if is_binary else []),
        f"| parameters | {card.parameters:,} |",
        f"| size | {card.megabits:.2f} Mbit |",
        *(
            [f"| one image, one thread, packed | {card.milliseconds:.2f} ms (onnxruntime, float network: "
             f"{card.float_milliseconds:.2f} ms) on {card.measured_on} |"]
            if card.milliseconds is not None and card.float_milliseconds is not None else []
        ),
        f"| training | {card.epochs} epochs, learning rate {card.lr:g}, seed {card.seed}, {card.hours:g} hours |",
        *([f"| distilled from | `{card.teacher}` |"] if card.teacher else []),
        f"| trained on | {card.trained_on}; torch {card.torch}; commit {card.commit} |", "",
        "One run, one seed: another seed gives another number. The whole recipe is in the header of the weights file, "
        "`model.recipe` once it is loaded. The network knows the classes of its training data alone and gives one of "
        "them to every image; it was tested on no others.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, help="directories of comparisons")
    parser.add_argument("--data-dir", type=Path, help="where the named data sets are")
    parser.add_argument(
        "--machine", default=processor(), help="the processor they were trained on; by default this one"
    )
    parser.add_argument("--again", action="store_true", help="measure all shipped files anew")
    parser.add_argument("--table", action="store_true", help="write only cards and table")
    args = parser.parse_args(argv)
    if args.table + args.again + bool(args.directories) != 1:
        parser.error("give the directories of comparisons, or --again, or --table")
    return args


if __name__ == "__main__":
    args = arguments()
    for directory in args.directories:
        for path in make(directory, args.data_dir, args.machine):
            print(path.name)
    for path in again(args.data_dir) if args.again else ():
        print(path.name)
    write_pages(cards())
