"""Commands on one network: summary, bench, export; and schemes, which lists what is installed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from bonn_qat.cli.exits import say
from bonn_qat.cli.options import NoPlugins, Size, console, numbers, scheme_of
from bonn_qat.errors import InvalidRecipe

if TYPE_CHECKING:
    from torch import nn


def summary(
    model: Annotated[str, typer.Argument(help="Any timm model.")],
    scheme: Annotated[str, typer.Option(help="The scheme, or float.")] = "bonn",
    num_classes: Annotated[int, typer.Option()] = 1000,
    img_size: Size = 224,
    no_plugins: NoPlugins = False,
) -> None:
    """Bits, sizes and multiply-accumulates of a network, layer by layer, and what stays float and why."""
    import timm

    import bonn_qat.models  # noqa: F401 (registers the paper's networks with timm)
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.errors import UnknownName
    from bonn_qat.inspection.summary import summary as summarise

    if not timm.is_model(model):
        raise UnknownName("model", model, timm.list_models())
    size = (3, img_size, img_size)
    network = binarize(
        timm.create_model(model, num_classes=num_classes), scheme_of(scheme), input_size=size, inplace=True
    )
    typer.echo(str(summarise(network, size)))


def bench(
    model: Annotated[str, typer.Argument(help="Any timm model.")],
    scheme: Annotated[str, typer.Option(help="The scheme of the binary network.")] = "bonn",
    img_size: Size = 224,
    num_classes: Annotated[int, typer.Option()] = 1000,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated numbers of images in a call.")] = "1,32",
    threads: Annotated[str, typer.Option(help="Comma-separated numbers of threads; by default 1 and all cores.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the arms take turns.")] = 20,
    startup: Annotated[
        bool, typer.Option("--startup", help="Also start each arm in processes of its own: time and peak memory.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Directory for bench.json and bench.svg.")] = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Latency and size of a network on this machine: float PyTorch, onnxruntime float and int8, packed.

    The weights are random: what they are changes neither.
    """
    import timm

    import bonn_qat.models  # noqa: F401 (registers the paper's networks with timm)
    from bonn_qat.bench import bench as measure
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.errors import UnknownName
    from bonn_qat.files.atomic import write_json, write_text
    from bonn_qat.plotting import MatplotlibMissing

    counts, batches = numbers(threads, "--threads"), numbers(batch_sizes, "--batch-sizes")
    if not timm.is_model(model):
        raise UnknownName("model", model, timm.list_models())
    size = (3, img_size, img_size)
    network = timm.create_model(model, num_classes=num_classes)
    binary = binarize(network, scheme_of(scheme), input_size=size)
    with console.status("starting") as status:
        found = measure(
            network, binary, size, name=model, batches=batches, threads=counts or None, rounds=rounds,
            startup_rounds=3 if startup else 0, watch=status.update,
        )  # fmt: skip
    typer.echo(str(found))
    if output:
        written = [write_json(output / "bench.json", found.to_json())]
        try:
            if chart := found.chart():
                written.append(write_text(output / "bench.svg", chart))
        except MatplotlibMissing as error:
            say(str(error))
        say(f"written: {', '.join(map(str, written))}")
    if found.failures:
        raise typer.Exit(1)


def export(
    source: Annotated[
        str, typer.Argument(help="The weights that a comparison left, runs/NAME.safetensors, or any timm model.")
    ],
    format: Annotated[str, typer.Option(help="onnx, qonnx, pt2, packed or c.")],
    output: Annotated[Path, typer.Option(help="The file to write.")],
    scheme: Annotated[str | None, typer.Option(help="The scheme of a timm model; by default bonn.")] = None,
    img_size: Annotated[
        int | None, typer.Option(help="Height and width; by default those of the training, or 224.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of a timm model; by default 1000.")] = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Write a binary network as a file for another runtime, and compare what the two give.

    A timm model is as it starts, with random weights.
    """
    from bonn_qat.exporting.export import PackageMissing, verify
    from bonn_qat.exporting.export import export as write

    network, size = _source(source, scheme, img_size, num_classes)
    with console.status(f"writing {output}"):
        path = write(network, output, format, input_size=size)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    try:
        with console.status(f"running {output}"):
            agreement = verify(network, path, format, input_size=size)
    except PackageMissing as missing:
        typer.echo(f"not compared with the network: {missing}")
        return
    typer.echo(
        f"difference from the network's outputs on random images: at most {agreement.difference:.2g}, "
        f"median {agreement.median:.2g}; the same class for {agreement.same:.1%}"
    )


def schemes(no_plugins: NoPlugins = False) -> None:
    """The schemes that are installed, with their bits, references and options."""
    from bonn_qat import plugins

    for scheme in sorted(plugins.schemes().values(), key=lambda scheme: scheme.name):
        options = ", ".join(f"{name}={value!r}" for name, value in scheme.options.items())
        console.print(f"[bold]{scheme.name}[/bold]  {scheme.bits} bits W/A", highlight=False)
        console.print(Padding(Text(scheme.reference), (0, 0, 0, 4)))
        if options:
            console.print(Padding(Text(f"options: {options}"), (0, 0, 0, 4)))
    for fault in plugins.faults():
        say(f"not listed: {fault}")
    console.print(
        "Set options in a recipe's table scheme_options, or: compare --schemes xnor:input_scale=true+gradient=plain"
    )


def _source(
    source: str, scheme: str | None, img_size: int | None, num_classes: int | None
) -> tuple["nn.Module", tuple[int, int, int]]:
    """The network of a weights file, or of timm's name, and the size of its images."""
    import timm

    import bonn_qat.models  # noqa: F401 (registers the paper's networks with timm)
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.errors import UnknownName
    from bonn_qat.training.network import restore

    if source.endswith(".safetensors") or Path(source).is_file():
        if scheme is not None or num_classes is not None:
            raise InvalidRecipe(f"{source} says itself of which scheme and how many classes it is; leave them out")
        network, (channels, height, width) = restore(Path(source))
        return network, (channels, img_size or height, img_size or width)
    if not timm.is_model(source):
        raise UnknownName("model", source, timm.list_models())
    size = (3, img_size or 224, img_size or 224)
    network = timm.create_model(source, num_classes=1000 if num_classes is None else num_classes)
    return binarize(network, scheme_of(scheme or "bonn"), input_size=size, inplace=True), size
