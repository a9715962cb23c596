"""Commands for one network: summary, bench and export; and schemes, which lists the installed schemes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from bonn_qat.cli.exits import say, say_written
from bonn_qat.cli.options import Argument, NoPlugins, Option, Size, console, numbers, scheme_of
from bonn_qat.errors import InvalidRecipe, UnknownName

if TYPE_CHECKING:
    from torch import nn


def summary(
    model: Annotated[str, Argument(help="Any timm model.")],
    scheme: Annotated[str, Option(help="The scheme, or float.")] = "bonn",
    num_classes: Annotated[int, Option(help="Classes of the network.")] = 1000,
    img_size: Size = 224,
    no_plugins: NoPlugins = False,
) -> None:
    """Show the bits, size and multiply-accumulates of each layer, and which layers stay float and why."""
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.inspection.summary import summary as summarise

    size = (3, img_size, img_size)
    network = binarize(_float(model, num_classes), scheme_of(scheme), input_size=size, inplace=True)
    console().print(summarise(network, size))


def bench(
    model: Annotated[str, Argument(help="Any timm model.")],
    scheme: Annotated[str, Option(help="The scheme of the binary network.")] = "bonn",
    img_size: Size = 224,
    num_classes: Annotated[int, Option(help="Classes of the network.")] = 1000,
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

    The weights are random; latency and size do not depend on them.
    """
    from bonn_qat.bench import bench as measure
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.files.atomic import check_writable, write_json, write_text
    from bonn_qat.plotting import MatplotlibMissing

    if output:
        check_writable(output / "bench.json")
    counts, batches = numbers(threads, "--threads"), numbers(batch_sizes, "--batch-sizes")
    size = (3, img_size, img_size)
    network = _float(model, num_classes)
    binary = binarize(network, scheme_of(scheme), input_size=size)
    with console().status("starting") as status:
        found = measure(
            network, binary, size, name=model, batches=batches, threads=counts or None, rounds=rounds,
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
    source: Annotated[str, Argument(help="A weights file of a comparison, runs/NAME.safetensors, or any timm model.")],
    format: Annotated[str, Option(help="onnx, qonnx, pt2, packed or c.")],
    output: Annotated[Path, Option(help="The file to write.")],
    scheme: Annotated[str | None, Option(help="The scheme of a timm model; by default bonn.")] = None,
    img_size: Annotated[
        int | None, Option(help="Height and width of an image; by default as in training, or 224.")
    ] = None,
    num_classes: Annotated[int | None, Option(help="Classes of a timm model; by default 1000.")] = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Write a binary network to a file for another runtime, run the file, and compare the outputs.

    A timm model is exported with random weights.
    """
    from bonn_qat.exporting.export import PackageMissing, verify
    from bonn_qat.exporting.export import export as write

    network, size = _source(source, scheme, img_size, num_classes)
    with console().status(f"writing {output}"):
        path = write(network, output, format, input_size=size)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
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


def _float(model: str, num_classes: int) -> "nn.Module":
    """A timm model with random weights. Raises UnknownName."""
    import timm

    if not timm.is_model(model):
        raise UnknownName("model", model, timm.list_models())
    return timm.create_model(model, num_classes=num_classes)  # type: ignore[no-any-return]


def _source(
    source: str, scheme: str | None, img_size: int | None, num_classes: int | None
) -> tuple["nn.Module", tuple[int, int, int]]:
    """The network of a weights file or a timm model, and the size of its images."""
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.training.network import load

    if source.endswith(".safetensors") or Path(source).is_file():
        if scheme is not None or num_classes is not None:
            raise InvalidRecipe(f"{source} holds its scheme and classes; leave out --scheme and --num-classes")
        network = load(source)
        channels, height, width = network.binarization.input_size  # type: ignore[union-attr, misc]
        return network, (channels, img_size or height, img_size or width)
    size = (3, img_size or 224, img_size or 224)
    network = _float(source, 1000 if num_classes is None else num_classes)
    return binarize(network, scheme_of(scheme or "bonn"), input_size=size, inplace=True), size
