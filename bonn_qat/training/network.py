"""Network: from a recipe, or from a weights file that a run left, to a binarized network."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bonn_qat import plugins
from bonn_qat.binarization.binarize import binarize, binary_layers
from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe, UnknownName
from bonn_qat.files.plain import one_line, shown
from bonn_qat.files.tensors import read_tensors
from bonn_qat.scheme import Scheme
from bonn_qat.training.data import Data
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.schedule import stage_of

WEIGHTS_FORMAT = 1
_LARGEST = 2**20  # classes, or pixels along an edge


def recipe_scheme(recipe: Recipe, pm: pluggy.PluginManager | None = None) -> Scheme:
    """The recipe's scheme with its options, stages and start of the latents. Raises UnknownName and InvalidRecipe."""
    scheme = plugins.find_scheme(recipe.scheme, pm)
    scheme = replace(scheme, stages=recipe.stages or scheme.stages).configure(recipe.scheme_options)
    return scheme if recipe.latents == "scheme" else replace(scheme, latent_std=recipe.latent_std)


def check(recipe: Recipe, pm: pluggy.PluginManager | None = None) -> None:
    """Raise UnknownName for a model, scheme, option or regularizer of the recipe that nobody offers."""
    import timm

    import bonn_qat.models  # noqa: F401 (registers the paper's networks with timm)

    if not timm.is_model(recipe.model):
        raise UnknownName("model", recipe.model, timm.list_models())
    for stage in recipe_scheme(recipe, pm).stages:
        for name in stage.regularizers:
            plugins.find_regularizer(name, pm)
    for name in recipe.regularizer_options:
        plugins.find_regularizer(name, pm)


def build(recipe: Recipe, data: Data, pm: pluggy.PluginManager | None = None) -> nn.Module:
    """The recipe's network for ``data``, binarized. The same seed gives every scheme the same float start.

    Raises what :func:`check` and :func:`bonn_qat.binarize` raise, and InvalidData for a checkpoint that is not this
    network's.
    """
    return _build(recipe, data.classes, data.image[0], pm)


def _build(recipe: Recipe, classes: int, channels: int, pm: pluggy.PluginManager | None) -> nn.Module:
    check(recipe, pm)
    torch.manual_seed(recipe.seed)
    model, scheme = float_network(recipe, classes, channels), recipe_scheme(recipe, pm)
    # A stage with float weights wants them as they are: the latents' scale comes with the first binary stage.
    float_first = scheme.stages[0].weights == "float"
    start = replace(scheme, latent_std=None) if float_first else scheme
    model = binarize(model, start, skip=recipe.skip, include=recipe.include, inplace=True, pm=pm)
    if recipe.checkpoint:
        load_file(model, Path(recipe.checkpoint))
    model.binarization = replace(model.binarization, scheme=scheme)  # type: ignore[type-var]
    return model


def float_network(recipe: Recipe, classes: int, channels: int) -> nn.Module:
    """timm's network for the recipe, before it is binarized. Raises InvalidRecipe where timm cannot make it."""
    import timm

    try:
        network: nn.Module = timm.create_model(
            recipe.model, num_classes=classes, in_chans=channels, **recipe.model_options
        )
    except (MemoryError, BonnQatError):
        raise
    except Exception as error:  # whatever a network of timm makes of its arguments
        raise InvalidRecipe(
            f"timm cannot make {recipe.model!r} for {classes} classes with model_options "
            f"{shown(dict(recipe.model_options))}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return network


def load_file(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``model``. Raises InvalidData naming the file for one of another network."""
    _load(model, read_tensors(path)[0], path)


def _load(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first, *rest = (line.strip() for line in str(error).splitlines() if line.strip())
        raise InvalidData(
            f"{path} is no checkpoint of this {type(model).__name__}: {one_line(' '.join(rest) or first)}"
        ) from error


def weights_header(recipe: Recipe, data: Data) -> dict[str, Any]:
    """What stands in a weights file beside the tensors, so that :func:`restore` can make the network that they are of.

    ``format``, a number; ``recipe`` as data; ``classes``; ``image`` ``[C, H, W]``.
    """
    return {
        "format": WEIGHTS_FORMAT,
        "recipe": recipe.to_dict(),
        "classes": data.classes,
        "image": list(data.image),
    }


def restore(path: Path, pm: pluggy.PluginManager | None = None) -> tuple[nn.Module, tuple[int, int, int]]:
    """The trained network of the weights file that a comparison left, ``runs/NAME.safetensors``, in evaluation mode.

    Also returns the size ``(C, H, W)`` of the images that it was trained on. The plugin of its scheme must be
    installed, the data need not be there; nothing is downloaded, and nothing in the file is run.

    Raises InvalidData naming the file: if it cannot be read, says nothing of its network, is of another format, holds
    an unfinished run or tensors of another network, or has a recipe with what this installation does not know.
    """
    tensors, header = read_tensors(path)
    _check_header(header, path)
    channels, height, width = header["image"]
    try:
        recipe = Recipe.from_dict(header["recipe"])
        options = {**recipe.model_options, "pretrained": False, "checkpoint_path": ""}  # the weights are here
        recipe = replace(recipe, model_options=options, checkpoint="")
        check(recipe, pm)
        _check_size(recipe, header["classes"], channels, tensors)
        with torch.random.fork_rng():
            model = _build(recipe, header["classes"], channels, pm)
        stages = recipe_scheme(recipe, pm).stages
    except BonnQatError as error:
        raise InvalidData(f"{path} cannot be restored: {error}") from error
    _load(model, tensors, path)
    for _, layer in binary_layers(model):
        layer.enter(stages[stage_of(stages, recipe.epochs, recipe.epochs)])
    return model.eval(), (channels, height, width)


def _check_size(recipe: Recipe, classes: int, channels: int, tensors: Mapping[str, Tensor]) -> None:
    """Before anything of the network's size is allocated: it must be what the file holds, give or take its scheme."""
    held = sum(tensor.numel() for tensor in tensors.values())
    claimed = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal claimed
        claimed += 0 if parameter is None else parameter.numel()
        # At once, for the making of a network of many layers takes long without any memory.
        if claimed > 2 * held + 1024:
            raise InvalidData(f"it holds {held:,} numbers, and says to be a network of more than {claimed:,}")

    counting = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            float_network(recipe, classes, channels)
    finally:
        counting.remove()


def _check_header(header: Mapping[str, Any], path: Path) -> None:
    if "recipe" not in header:
        raise InvalidData(
            f"{path} does not say of which network it holds the weights: an earlier version of bonn-qat wrote it, or "
            "another program; make the network yourself and give it to load_state_dict, or train it again"
        )
    if "stage" in header:
        raise InvalidData(f"{path} is the checkpoint of a run that is not finished; the same command goes on from it")
    if header.get("format") != WEIGHTS_FORMAT:
        raise InvalidData(
            f"{path} is of format {shown(header.get('format'))}; this version of bonn-qat reads {WEIGHTS_FORMAT}"
        )
    known = {"format", "recipe", "classes", "image"}
    if header.keys() != known:
        raise InvalidData(
            f"{path} is no weights file: the keys of its header differ in {shown(sorted(header.keys() ^ known))}"
        )
    recipe, image, classes = header["recipe"], header["image"], header["classes"]
    sizes = [classes, *image] if isinstance(image, list) else []
    is_sized = [type(size) for size in sizes] == [int] * 4 and min(sizes) >= 1 and max(sizes) <= _LARGEST
    if not isinstance(recipe, dict) or not is_sized:
        raise InvalidData(
            f"{path} is no weights file: {repr(classes)[:40]} classes, images of {repr(image)[:80]}, or a recipe "
            f"without keys; sizes are 1 to {_LARGEST}"
        )
