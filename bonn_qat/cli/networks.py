"""Commands for one network: summary, bench, export, evaluate and predict; and schemes, which lists the installed ones.

Each takes a network as a timm model, a pretrained network of a plugin, or a weights file.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from bonn_qat.cli.exits import say, say_written
from bonn_qat.cli.options import IMAGE, Argument, DataDir, NoPlugins, Option, console, numbers, scheme_of
from bonn_qat.errors import InvalidData, InvalidRecipe

if TYPE_CHECKING:
    from torch import nn

Source = Annotated[
    str,
    Argument(
        help="Any timm model, a pretrained network such as wrn22_16.bonn_cifar10, or a weights file of a training run, "
        "runs/NAME.safetensors."
    ),
]
Trained = Annotated[
    str,
    Argument(help="A pretrained network such as wrn22_16.bonn_cifar10, a weights file, or a packed network's file."),
]
Scheme = Annotated[str | None, Option(help="The scheme of a timm model, or float; by default bonn.")]
Classes = Annotated[int | None, Option(min=1, help="Classes of a timm model; by default 1000.")]
Edge = Annotated[int | None, Option(min=1, help="Height and width of an image; by default as in training, or 224.")]


def summary(
    source: Source,
    scheme: Scheme = None,
    num_classes: Classes = None,
    img_size: Edge = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Show the bits, size and multiply-accumulates of each layer, and which layers stay float and why."""
    from bonn_qat.inspection.summary import summary as summarise

    network, size = _source(source, scheme, img_size, num_classes)
    console().print(summarise(network, size))


def bench(
    source: Source,
    scheme: Scheme = None,
    img_size: Edge = None,
    num_classes: Classes = None,
    batch_sizes: Annotated[str, Option(help="Batch sizes, separated by commas.")] = "1,32",
    threads: Annotated[str, Option(help="Numbers of threads, separated by commas; by default 1 and all cores.")] = "",
    rounds: Annotated[int, Option(min=1, help="How many times each backend is measured, in turns.")] = 20,
    startup: Annotated[
        bool, Option("--startup", help="Also measure start-up time and peak memory in new processes.")
    ] = False,
    output: Annotated[Path | None, Option(help="Directory to write bench.json and bench.svg to.")] = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Measure latency and size of a network on this machine: float PyTorch, onnxruntime float and int8, and packed.

    A timm model has random weights; latency and size do not depend on them.
    """
    from bonn_qat.bench import bench as measure
    from bonn_qat.files.atomic import check_writable, write_json, write_text
    from bonn_qat.plotting import MatplotlibMissing
    from bonn_qat.training.network import is_path

    if output:
        check_writable(output / "bench.json")
    counts, batches = numbers(threads, "--threads"), numbers(batch_sizes, "--batch-sizes")
    binary, size = _source(source, scheme, img_size, num_classes)
    network = _float_form(binary) if hasattr(binary, "recipe") else _float(source, num_classes or 1000)
    name = Path(source).stem if is_path(source) else source
    with console().status("starting") as status:
        found = measure(
            network, binary, size, name=name, batches=batches, threads=counts or None, rounds=rounds,
            startup_rounds=3 if startup else 0, watch=status.update,
        )  # fmt: skip
    console().print(found)
    if output:
        written = [write_json(output / "bench.json", found.to_json())]
        try:
            if chart := found.chart():
                written.append(write_text(output / "bench.svg", chart))
        except MatplotlibMissing as error:
            say(str(error))
        say_written(*written, what="written")
    if found.failures:
        raise click.exceptions.Exit(1)


def export(
    source: Source,
    format: Annotated[str, Option(help="onnx, qonnx, pt2, packed, c or wasm.")],
    output: Annotated[Path, Option(help="The file to write, or the folder for c and wasm.")],
    scheme: Scheme = None,
    img_size: Edge = None,
    num_classes: Classes = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Write a binary network for another runtime, run what was written, and compare the outputs.

    A timm model is exported with random weights.
    """
    from bonn_qat.exporting.export import PackageMissing, verify
    from bonn_qat.exporting.export import export as write

    network, size = _source(source, scheme, img_size, num_classes)
    with console().status(f"writing {output}"):
        path = write(network, output, format, input_size=size)
    files = path.iterdir() if path.is_dir() else [path]
    click.echo(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:.2f} MB")
    try:
        with console().status(f"running {output}"):
            agreement = verify(network, path, format, input_size=size)
    except PackageMissing as missing:
        click.echo(f"outputs not compared: {missing}")
        return
    click.echo(
        f"difference from the network's outputs on random images: at most {agreement.difference:.2g}, "
        f"median {agreement.median:.2g}; the same class for {agreement.same:.1%}"
    )


def schemes(no_plugins: NoPlugins = False) -> None:
    """List the installed schemes with their bits, references and options."""
    from bonn_qat import plugins
    from bonn_qat.tables import Column, Table

    columns = [
        Column("scheme", text=True), Column("bits W/A", text=True),
        Column("reference, and options with their defaults", text=True, wraps=True),
    ]  # fmt: skip
    rows = []
    for name, scheme in sorted(plugins.schemes().items()):
        options = ", ".join(f"{key}={value!r}" for key, value in scheme.options.items())
        rows.append((name, scheme.bits, scheme.reference + (f"\noptions: {options}" if options else "")))
    console().print(Table(columns, rows, grouped=1))
    for fault in plugins.faults():
        say(f"not listed: {fault}")
    console().print(
        "\nSet options in a recipe's table scheme_options, or on the command line:\n"
        "bonn-qat compare --schemes xnor:input_scale=true+gradient=plain",
        highlight=False,
    )


def evaluate(
    source: Trained,
    data: Annotated[str, Option(help="digits, cifar10, cifar100, fashion-mnist, or the path of an image folder.")],
    data_dir: DataDir = None,
    img_size: Edge = None,
    packed: Annotated[
        bool, Option("--packed", help="Evaluate the network of bits: the plugin's file, or else packed now.")
    ] = False,
    no_plugins: NoPlugins = False,
) -> None:
    """Measure the accuracy of a trained network on the test set of labelled images."""
    from bonn_qat.files.preprocessing import preprocessing_of
    from bonn_qat.training.data import CROP
    from bonn_qat.training.data import load as load_data
    from bonn_qat.training.evaluate import evaluate as measure

    network, size = _trained(source, packed)
    known = preprocessing_of(network)
    images = load_data(data, directory=data_dir, size=img_size or size[-1], crop=known.crop if known else CROP)
    if img_size and images.image[-1] != img_size:
        raise InvalidData(
            f"--img-size is for image folders; the images of {data} have {images.image[-1]} pixels an edge"
        )
    with console().status(f"evaluating {source}"):
        found = measure(network, images)
    top5 = "" if found.top5 is None else f", top-5 {found.top5:.2f} %"
    click.echo(f"{source}: top-1 {found.top1:.2f} %{top5}, loss {found.loss:.4f} on {found.images:,} images of {data}")


def predict(
    source: Trained,
    images: Annotated[tuple[str, ...], Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, Option(min=1, help="Classes to show for each image.")] = 3,
    no_plugins: NoPlugins = False,
) -> None:
    """Show the classes that a trained network sees in image files, with their probabilities."""
    from bonn_qat.training.evaluate import predict as guess

    for path, guesses in zip(images, guess(_trained(source)[0], images, top=top), strict=True):
        click.echo(f"{path}: " + ", ".join(f"{label} {probability:.1%}" for label, probability in guesses))


def _float(model: str, num_classes: int) -> "nn.Module":
    """A timm model with random weights. Raises UnknownName."""
    from bonn_qat.training.pretrained import create_model

    return create_model(model, num_classes=num_classes)


def _source(
    source: str, scheme: str | None, img_size: int | None, num_classes: int | None
) -> tuple["nn.Module", tuple[int, int, int]]:
    """The binary network that ``source`` names, and the size of its images."""
    from bonn_qat import plugins
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.training.network import is_path

    if is_path(source) or source in plugins.pretrained():
        if scheme is not None or num_classes is not None:
            raise InvalidRecipe(f"{source} holds its scheme and classes; leave out --scheme and --num-classes")
        network = _load(source)
        channels, height, width = network.binarization.input_size  # type: ignore[union-attr, misc]
        return network, (channels, img_size or height, img_size or width)
    size = (3, img_size or IMAGE, img_size or IMAGE)
    network = _float(source, 1000 if num_classes is None else num_classes)
    return binarize(network, scheme_of(scheme or "bonn"), input_size=size, inplace=True), size


def _load(source: str) -> "nn.Module":
    """The network of a weights file or of a pretrained network, in evaluation mode."""
    from bonn_qat.training.network import load, weights_file

    return load(weights_file(source))


def _trained(source: str, packed: bool = False) -> tuple["nn.Module", tuple[int, ...]]:
    """The trained network that ``source`` names, if ``packed`` as bits, and the size of its images."""
    from bonn_qat import plugins
    from bonn_qat.files.tensors import read_tensors
    from bonn_qat.packing.pack import pack
    from bonn_qat.runtime.packed import PackedModel
    from bonn_qat.training.network import is_path

    file = Path(source) if is_path(source) else None
    if file is None and packed:
        file = plugins.find_pretrained(source).packed
    if file and read_tensors(file)[1].get("kind") == "packed":
        network = PackedModel.load(file)
        return network, network.input_size
    model = _load(source)
    size: tuple[int, ...] = model.binarization.input_size  # type: ignore[union-attr, assignment]
    return pack(model) if packed else model, size


def _float_form(network: "nn.Module") -> "nn.Module":
    """The float network that a binary one with a recipe was made of, with random weights."""
    from torch import nn

    from bonn_qat.heads import classifier
    from bonn_qat.training.network import float_network

    _, head = classifier(network)
    classes = head.out_channels if isinstance(head, nn.Conv2d) else head.out_features
    channels = network.binarization.input_size[0]  # type: ignore[union-attr, index]
    return float_network(network.recipe, classes, channels)  # type: ignore[arg-type]
