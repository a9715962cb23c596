"""Do two checkouts train alike? Both do the same steps from the same seeds, and their losses stand side by side.

By default half an epoch of CIFAR-10. The float network, in which nothing of the package takes part but the losses, is
the control. Examples::

    python benchmarks/same_training.py --against ../before --data-dir DATA --output same.json --page
    python benchmarks/same_training.py --against ../before --data-dir DATA --arms bonn xnor --precision bfloat16
    python benchmarks/same_training.py --input same.json --page

The file of ``--output`` is JSON: ``options`` of the command line, ``environment``, ``machine``, ``before`` (the
environment of the other checkout), and ``results``, one for each variant of an arm: its fields, and ``now`` and
``before``, the loss of each step in this checkout and the other one.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from measuring import (
    BEFORE,
    NOW,
    ROOT,
    Child,
    Training,
    Variant,
    heading,
    parse,
    plain,
    prepare_torch,
    report,
    serve,
    subtitle,
    variants,
)

from bonn_qat.training.data import load

EVERY = 20  # steps


def measure_all(args: Namespace) -> dict[str, Any]:
    """The document of all measurements."""
    document = heading(args)
    children = {"now": Child(__file__, ROOT), BEFORE: Child(__file__, args.against)}
    results = [
        {"name": variant.name, **variant._asdict()}
        | {name: child.call("train", variant, plain(args)) for name, child in children.items()}
        for variant in variants(args)
        if variant.checkout == NOW
    ]
    for child in children.values():
        child.close()
    return document | {"before": children[BEFORE].package, "results": results}


def train(variant: Sequence[Any], options: dict[str, Any]) -> list[float]:
    """The loss of every step, with the package of this process."""
    made, chosen = Variant(*variant), Namespace(**options)
    prepare_torch(chosen.threads)
    data = load(chosen.data, directory=chosen.data_dir).to(torch.device(chosen.device))
    training = Training(made, chosen.model, data.image, data.classes, chosen, lr=chosen.lr)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    while len(losses) < chosen.steps:
        for images, targets in data.train_batches(chosen.batch, generator, augment=True):
            losses.append(float(training.step(images.contiguous(memory_format=training.layout), targets)))
            if len(losses) % EVERY == 0:
                print(f"{made.name}, step {len(losses)}: {losses[-1]}", file=sys.stderr)
            if len(losses) == chosen.steps:
                break
    return losses


def tables(document: dict[str, Any]) -> str:
    """The results as Markdown, the losses every 20 steps."""
    options = document["options"]
    lines = [
        f"{options['model']}, {options['data']}, batch {options['batch']}, learning rate {options['lr']:g}, "
        f"{subtitle(document)}"
    ]
    for result in document["results"]:
        now, before = result["now"], result[BEFORE]
        lines += ["", f"**{result['name']}**: {differences(now, before)}", "", "| step | now | before | difference |"]
        lines.append("|---|---|---|---|")
        for step in sorted({1, *range(EVERY, len(now) + 1, EVERY), len(now)}):
            a, b = now[step - 1], before[step - 1]
            lines.append(f"| {step} | {a:.6f} | {b:.6f} | {a - b:.1e} |")
    return "\n".join(lines) + "\n"


def differences(now: Sequence[float], before: Sequence[float]) -> str:
    """Where two trainings differ, in words."""
    apart = [abs(a - b) for a, b in zip(now, before, strict=True)]
    first = next((step for step, distance in enumerate(apart, 1) if distance), None)
    if first is None:
        return f"the same losses, bit for bit, in all {len(apart)} steps."
    largest = max(apart)
    return (
        f"the same losses, bit for bit, before step {first}; the largest difference in {len(apart)} steps is "
        f"{largest:.1e}, in step {apart.index(largest) + 1}."
    )


def arguments(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn22_16", help="a timm model (default: %(default)s)")
    parser.add_argument("--data", default="cifar10", help="a data set of bonn_qat.training.data (default: %(default)s)")
    parser.add_argument("--data-dir", help="the folder that holds it, or that it is downloaded to")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=195, help="half an epoch of 50,000 images in batches of 128")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    args = parse(parser, ["bonn"], argv)
    if not (args.against or args.input):
        parser.error("--against is missing: the checkout to compare with")
    return args


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve({"train": train})
    else:
        report(__file__, arguments(), measure_all, tables)
