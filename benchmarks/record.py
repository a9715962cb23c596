"""Turn a comparison, or a setting of `reproduce`, into the dated files of `benchmarks/results`: a table and its runs.

Example::

    python benchmarks/record.py results/cifar10-20261122-101500 2026-11-22-cifar10-wrn10
    python benchmarks/record.py results/table3/cifar10-wrn22-16 2026-11-25-table3 --page results/table3/table3.md
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from bonn_qat import Recipe
from bonn_qat.studies import statistics
from bonn_qat.studies.comparison import Comparison, read_comparison

RESULTS = Path(__file__).parent / "results"
# What is worth a word where it is not the default.
_SHARED = ("norm_decay", "label_smoothing", "validation_images", "norm_start", "checkpoint", "teacher", "distillation",
           "temperature", "compile", "precision")  # fmt: skip


def main() -> None:
    """Write ``NAME.md`` and ``NAME.json``; existing files are never overwritten."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("name")
    parser.add_argument("--page", type=Path, help="the study's Markdown, instead of a table of the comparison")
    args = parser.parse_args()
    comparison = read_comparison(args.directory)
    runs = [{key: value for key, value in asdict(run).items() if key != "histograms"} for run in comparison.results]
    content = {"data": comparison.data, "failures": comparison.failures, "missing": comparison.missing, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    page = args.page.read_text(encoding="utf-8") if args.page else _page(comparison)
    for suffix, text in ((".md", page), (".json", json.dumps(content) + "\n")):
        with (RESULTS / f"{args.name}{suffix}").open("x", encoding="utf-8") as file:
            file.write(text)


def _page(comparison: Comparison) -> str:
    data, run = comparison.data, comparison.results[0]
    settings = ["model", "epochs", "batch_size", "optimizer", "lr", "schedule", "weight_decay"]
    settings += [key for key, value in asdict(Recipe()).items() if key in _SHARED and run.recipe[key] != value]
    lines = [
        f"# {data['name']}: {data['train']} training and {data['test']} test images",
        "",
        ", ".join(f"{key} {run.recipe[key]}" for key in settings),
        "",
        ", ".join(f"{key} {value}" for key, value in run.environment.items()),
        "",
        "| scheme | bits W/A | latents | seeds | top-1 (%) | Mbit | times smaller | flips (%/epoch) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.title} | {row.bits} | {row.latents} | {len(row.seeds)} | {row.accuracy} | {row.mbit:.2f} "
        f"| {row.compression:.1f} | {'-' if row.flips is None else f'{row.flips:.2f}'} |"
        for row in statistics.rows(comparison)
    ]
    lines += ["", *(f"- {difference}" for difference in statistics.differences(comparison))]
    lines += [f"- failed: {name}: {reason}" for name, reason in comparison.failures.items()]
    lines += [f"- missing: {name}" for name in comparison.missing]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
