"""Network: from a recipe, or from a weights file, to a binarized network; and back into a file."""

import contextlib
import copy
import os
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import pluggy
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from bonn_qat import plugins
from bonn_qat.binarization.binarize import Binarization, binarize, binary_layers
from bonn_qat.errors import (
    BonnQatError,
    InvalidData,
    InvalidModel,
    InvalidRecipe,
    UnknownName,
    is_out_of_memory,
    within_memory,
)
from bonn_qat.files.plain import one_line, shown
from bonn_qat.files.preprocessing import Preprocessing, preprocessing_of
from bonn_qat.files.tensors import read_tensors, write_tensors
from bonn_qat.files.validate import Allowed, read_own
from bonn_qat.heads import classifier, metadata
from bonn_qat.objective import non_finite
from bonn_qat.scheme import NONLINEARITIES, Scheme
from bonn_qat.training.data import Data
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.schedule import stage_of

WEIGHTS_FORMAT = 1
_LARGEST = 2**20  # classes, or pixels along an edge
# The largest networks of timm have some thousands of modules and take some seconds.
_MOST_MODULES, _MOST_SECONDS, _MOST_IN_OPTIONS = 2**13, 30, 2**17


def recipe_scheme(recipe: Recipe, pm: pluggy.PluginManager | None = None) -> Scheme:
    """The recipe's scheme with its options, stages and start of the latents. Raises UnknownName and InvalidRecipe."""
    scheme = plugins.find_scheme(recipe.scheme, pm)
    scheme = replace(scheme, stages=recipe.stages or scheme.stages).configure(recipe.scheme_options)
    return scheme if recipe.latents == "scheme" else replace(scheme, latent_std=recipe.latent_std)


def check(recipe: Recipe, pm: pluggy.PluginManager | None = None) -> None:
    """Raise UnknownName for a model, scheme, option or regularizer of the recipe that is not installed."""
    import timm

    if "." in recipe.model and recipe.model in plugins.pretrained(pm):
        raise InvalidRecipe(
            f'{recipe.model} is a trained network; start from it with model = "{recipe.model.partition(".")[0]}" and '
            f'checkpoint = "{recipe.model}"'
        )
    if not timm.is_model(recipe.model):
        raise UnknownName("model", recipe.model, timm.list_models())
    for stage in recipe_scheme(recipe, pm).stages:
        for name in stage.regularizers:
            plugins.find_regularizer(name, pm)
    for name in recipe.regularizer_options:
        plugins.find_regularizer(name, pm)


def check_trainable(recipe: Recipe, pm: pluggy.PluginManager | None = None) -> None:
    """:func:`check`, and raise UnknownName or InvalidData for a checkpoint or a teacher that is not there.

    A trained network loads without them.
    """
    check(recipe, pm)
    for source in filter(None, (recipe.checkpoint, recipe.teacher)):
        path = weights_file(source, pm)
        if not path.is_file():
            raise InvalidData(f"cannot read {path}: no such file")


def build(recipe: Recipe, data: Data, pm: pluggy.PluginManager | None = None) -> nn.Module:
    """The recipe's network for ``data``, binarized. The same seed gives every scheme the same float start.

    Raises what :func:`check` and :func:`bonn_qat.binarize` raise, InvalidData for a checkpoint of another network, and
    InvalidRecipe for options that describe a network of absurd size.
    """
    check(recipe, pm)
    try:
        _check_size(recipe, data.classes, data.image[0])
    except _TooLarge:
        raise
    except InvalidRecipe:
        pass  # it may be that only its description fails
    model = _build(recipe, data.classes, data.image, pm)
    model.preprocessing = data.preprocessing  # type: ignore[assignment]
    return model


def _build(recipe: Recipe, classes: int, image: tuple[int, ...], pm: pluggy.PluginManager | None) -> nn.Module:
    check(recipe, pm)
    torch.manual_seed(recipe.seed)
    model, scheme = float_network(recipe, classes, image[0]), recipe_scheme(recipe, pm)
    # A first stage with float weights trains them as they are: the first binary stage rescales the latents.
    float_first = scheme.stages[0].weights == "float"
    start = replace(scheme, latent_std=None) if float_first else scheme
    model = binarize(model, start, skip=recipe.skip, include=recipe.include, inplace=True, pm=pm)
    if recipe.checkpoint:
        _load_start(model, weights_file(recipe.checkpoint, pm))
    elif recipe.norm_start == "uniform" and not recipe.model_options.get("pretrained"):
        _draw_norms(model, recipe.seed)
    for _, layer in binary_layers(model):
        layer.scheme = scheme
    record = cast(Binarization, model.binarization)
    model.binarization = replace(record, scheme=scheme, input_size=image)  # type: ignore[assignment]
    model.recipe = recipe  # type: ignore[assignment]
    return model


@torch.no_grad()
def _draw_norms(model: nn.Module, seed: int) -> None:
    """Draw gamma of each batch norm from U(0, 1), from random numbers of its name alone."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            # Schemes differ in which norms they have, and the global generator must give all of them the same numbers.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            module.weight.uniform_(generator=generator)


def float_network(recipe: Recipe, classes: int, channels: int) -> nn.Module:
    """timm's network for the recipe, before it is binarized. Raises InvalidRecipe where timm cannot create it."""
    import timm

    try:
        network: nn.Module = timm.create_model(
            recipe.model, num_classes=classes, in_chans=channels, **recipe.model_options
        )
    except Exception as error:  # whatever a network of timm makes of its arguments
        if isinstance(error, BonnQatError) or is_out_of_memory(error):
            raise
        raise InvalidRecipe(
            f"timm cannot create {recipe.model!r} for {classes} classes with model_options "
            f"{shown(dict(recipe.model_options))}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return network


def to_memory_format(model: nn.Module, layout: torch.memory_format) -> None:
    """Change the memory format of the convolution kernels ``(O, I, kh, kw)`` of ``model`` in place."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            # contiguous() would keep the strides of a 1x1 kernel, which differ from those of its gradient.
            parameter.data = torch.empty_like(parameter.data, memory_format=layout).copy_(parameter.data)


def load_file(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into ``model``. Raises InvalidData naming the file if it is of another network."""
    _load_tensors(model, read_tensors(path)[0], path)


def _load_start(model: nn.Module, path: Path) -> None:
    """As :func:`load_file`; a classifier for another number of classes is left out, with a warning."""
    tensors, own = read_tensors(path)[0], model.state_dict()
    for name in metadata(model, "classifier"):
        head = {key: own[key] for key in (f"{name}.weight", f"{name}.bias") if key in own and key in tensors}
        classes = {len(of[key]) for key in head for of in (tensors, own)}
        if len(classes) > 1:
            warnings.warn(
                f"{path} sorts into {len(tensors[f'{name}.weight'])} classes, the data have "
                f"{len(own[f'{name}.weight'])}: {name} starts anew",
                stacklevel=2,
            )
            tensors = {**tensors, **head}
    _load_tensors(model, tensors, path)


def _load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        first, *rest = (line.strip() for line in str(error).splitlines() if line.strip())
        raise InvalidData(
            f"{path} is not a checkpoint of this {type(model).__name__}: {one_line(' '.join(rest) or first)}"
        ) from error


def is_path(source: str) -> bool:
    """Whether ``source`` is a path, and not a name: it has a directory or the suffix ``.safetensors``, or is a file."""
    path = Path(source)
    return path.suffix == ".safetensors" or path.is_file() or len(path.parts) != 1


def weights_file(source: str, pm: pluggy.PluginManager | None = None) -> Path:
    """``source`` as a path, or the file of the trained network of a plugin by this name. Raises UnknownName."""
    return Path(source) if is_path(source) else plugins.find_pretrained(source, pm).weights


def weights_header(recipe: Recipe, data: Data) -> dict[str, Any]:
    """The header of a weights file, from which :func:`load` makes the network before it loads the tensors."""
    return _header(recipe, data.classes, data.image, data.preprocessing)


def _header(
    recipe: Recipe,
    classes: int,
    image: tuple[int, ...],
    preprocessing: Preprocessing | None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    header = {"format": WEIGHTS_FORMAT, "recipe": recipe.to_dict(), "classes": classes, "image": list(image)}
    known = {"preprocessing": preprocessing and asdict(preprocessing), "card": card and dict(card)}
    return header | {key: value for key, value in known.items() if value}


def load(
    path: str | Path,
    *,
    trained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    model_options: Mapping[str, Any] | None = None,
    pm: pluggy.PluginManager | None = None,
) -> nn.Module:
    """The trained network of a weights file, ``runs/NAME.safetensors`` of a comparison or from :func:`save`.

    It is in evaluation mode; ``model.binarization.input_size`` is the size ``(C, H, W)`` of its images,
    ``model.preprocessing`` their mean and standard deviation and the names of the classes, and ``model.card`` what its
    maker wrote about it. The plugin of its scheme must be installed; the data are not needed. Nothing is downloaded,
    and no code in the file is run.

    To train it further on other data, ``num_classes`` gives it a new classifier if it had another number of classes,
    ``in_chans`` fits its first convolution to another number of channels, as timm does for pretrained weights, and
    ``model_options`` are further arguments of the network, such as ``{"drop_rate": 0.1}``. If not ``trained``, the
    network is as its training began.

    >>> model = bonn_qat.load("runs/bonn-0.01-seed0.safetensors")  # doctest: +SKIP

    Raises InvalidData naming the file: if it cannot be read, does not describe its network, is of another format, holds
    an unfinished run or tensors of another network, has a recipe with names that this installation does not know, or
    does not fit into memory. Raises InvalidRecipe for an impossible number of classes or channels.
    """
    with within_memory(str(path)):
        tensors, header = read_tensors(path)
        return restore(
            tensors, header, path, trained=trained, num_classes=num_classes, in_chans=in_chans,
            model_options=model_options, pm=pm,
        )  # fmt: skip


def restore(
    tensors: dict[str, Tensor],
    content: Mapping[str, Any],
    path: str | Path,
    *,
    trained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    model_options: Mapping[str, Any] | None = None,
    pm: pluggy.PluginManager | None = None,
) -> nn.Module:
    """As :func:`load`, of the tensors and the header of a weights file, which errors call ``path``."""
    for name, count in (("num_classes", num_classes), ("in_chans", in_chans)):
        if count is not None and not 1 <= count <= _LARGEST:
            raise InvalidRecipe(f"{name} is {count}; allowed: 1 to {_LARGEST:,}")
    header = _read_header(content, path)
    channels = header.image[0]
    header = replace(header, image=(in_chans or channels, *header.image[1:]))
    try:
        model = _rebuilt(header, tensors, model_options, pm)
    except BonnQatError as error:
        raise InvalidData(f"{path} cannot be restored: {error}") from error
    if trained and header.image[0] != channels:
        from timm.models import adapt_input_conv

        for name in (f"{layer}.weight" for layer in metadata(model, "first_conv")):
            tensors[name] = adapt_input_conv(header.image[0], tensors[name], channels)
    if trained:
        _load_tensors(model, tensors, path)
    if num_classes is not None and num_classes != header.classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
        header = replace(header, preprocessing=header.preprocessing and replace(header.preprocessing, labels=()))
    model.preprocessing = header.preprocessing if header.image[0] == channels else None  # type: ignore[assignment]
    model.card = header.card  # type: ignore[assignment]
    return model


def _rebuilt(
    header: "_Header",
    tensors: Mapping[str, Tensor],
    model_options: Mapping[str, Any] | None,
    pm: pluggy.PluginManager | None,
) -> nn.Module:
    """The network that a weights file describes, in evaluation mode, its tensors not loaded yet."""
    recipe = Recipe.from_dict(header.recipe)
    # The weights are here.
    options = {**recipe.model_options, **(model_options or {}), "pretrained": False, "checkpoint_path": ""}
    recipe = replace(recipe, model_options=options, checkpoint="")
    check(recipe, pm)
    held = sum(tensor.numel() for tensor in tensors.values())
    _check_size(recipe, header.classes, header.image[0], held)
    with torch.random.fork_rng():
        model = _build(recipe, header.classes, header.image, pm)
    stages = recipe_scheme(recipe, pm).stages
    for _, layer in binary_layers(model):
        layer.enter(stages[stage_of(stages, recipe.epochs, recipe.epochs)])
    return model.eval()


def save(
    model: nn.Module,
    path: str | Path,
    *,
    model_options: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    pm: pluggy.PluginManager | None = None,
) -> Path:
    """Write a trained timm model, binarized by :func:`bonn_qat.binarize`, so that :func:`load` can read it.

    The file holds the tensors, the names of the network and the scheme, and their options. ``model_options`` are the
    arguments that ``timm.create_model`` was called with besides ``num_classes`` and ``in_chans``, such as ``img_size``.
    ``card`` is what a reader should know, such as ``{"top1": 83.2, "data": "cifar10"}``: strings, numbers, lists and
    tables of these.
    Before anything is written the network is rebuilt from this data, and must give the same outputs.

    >>> bonn_qat.save(model, "trained.safetensors")  # doctest: +SKIP

    Raises InvalidModel for a network that cannot be rebuilt: not binarized, not timm's, made with other options, or
    with a scheme that no plugin offers; and for one that holds NaN or infinity. Raises OSError where the file cannot be
    written.
    """
    tensors, header = describe(model, model_options=model_options, card=card, pm=pm)
    return write_tensors(path, tensors, header)


def describe(
    model: nn.Module,
    *,
    model_options: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    pm: pluggy.PluginManager | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of the file that :func:`save` would write. Raises InvalidModel as it does."""
    if tensor := non_finite(model):
        raise InvalidModel(f"{tensor} of {type(model).__name__} holds NaN or infinity; save an earlier state of it")
    copied = copy.deepcopy(model).cpu().eval()
    to_memory_format(copied, torch.contiguous_format)  # as in the rebuilt network, for equal rounding
    tensors = copied.state_dict()
    try:
        for recipe, classes, image in _descriptions(model, model_options, pm):
            header = _header(recipe, classes, image, preprocessing_of(model), card)
            rebuilt = _rebuilt(_read_header(header, "the file"), tensors, None, pm)
            if _are_same(copied, rebuilt, image):
                return tensors, header
        raise InvalidModel(
            "timm.create_model builds another network from the same name; pass its arguments as model_options"
        )
    except BonnQatError as error:
        raise InvalidModel(
            f"{type(model).__name__} cannot be rebuilt from a file: {error}. Write model.state_dict() with "
            "safetensors.torch.save_file instead, and load it into the network that the same code builds"
        ) from error


def _descriptions(
    model: nn.Module, model_options: Mapping[str, Any] | None, pm: pluggy.PluginManager | None
) -> Iterator[tuple[Recipe, int, tuple[int, ...]]]:
    """What a network can be rebuilt from, the simplest first: recipe, classes and image size ``(C, H, W)``."""
    record = getattr(model, "binarization", None)
    if not isinstance(record, Binarization):
        raise InvalidModel("it is not binarized")
    if record.input_size is None:
        raise InvalidModel("the size of its images is unknown; give it to binarize: input_size=(C, H, W)")
    _, head = classifier(model)
    classes = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    if isinstance(recipe := getattr(model, "recipe", None), Recipe):
        yield recipe, classes, record.input_size
        return
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, dict) or not config.get("architecture"):
        raise InvalidModel("it was not created by timm.create_model")
    scheme = record.scheme
    recipe = Recipe(
        model=config["architecture"], data="", scheme=scheme.name, model_options=model_options or {},
        scheme_options=_options(scheme, plugins.find_scheme(scheme.name, pm)), stages=scheme.stages,
        latents=scheme.start,
        skip=record.skip, include=record.include,
    )  # fmt: skip
    yield recipe, classes, record.input_size
    # Layer by layer, in case a predicate chose them.
    yield replace(recipe, skip=(*record.skip, *record.kept), include=record.binary), classes, record.input_size


def _options(scheme: Scheme, registered: Scheme) -> dict[str, Any]:
    """The options that make ``registered`` into ``scheme``. Raises InvalidModel if the quantizers differ."""
    for part in ("weight", "activation", "output"):
        makers = [getattr(of, part) for of in (scheme, registered)]
        if len({getattr(make, "func", make) for make in makers}) > 1:  # a partial where it has options
            raise InvalidModel(f"its scheme is not {scheme.name!r} with options: the {part} differs")
    words = {make: word for word, make in NONLINEARITIES.items()}

    def values(of: Scheme) -> dict[str, Any]:
        own = {name: getattr(of, name) for name in of.takes - of.options.keys() - {"latent_std"}}
        return {name: words.get(v, v) if callable(v) else v for name, v in (own | of.options).items()}

    before = values(replace(registered, stages=scheme.stages))
    return {name: value for name, value in values(scheme).items() if name not in before or value != before[name]}


def _are_same(one: nn.Module, other: nn.Module, image: tuple[int, ...]) -> bool:
    """Whether both networks give equal outputs for images ``(C, H, W)``, with the tensors of ``one``."""
    try:
        other.load_state_dict(one.state_dict())
    except RuntimeError:
        return False
    images = torch.randn(2, *image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(one(images), other(images))


class _TooLarge(InvalidRecipe):
    """A recipe describes a network that is out of all proportion."""


def _check_size(recipe: Recipe, classes: int, channels: int, held: int | None = None) -> None:
    """Build the recipe's float network without memory, and refuse it if it is out of all proportion.

    That is one that this machine has no memory for, or that is much larger than the ``held`` numbers in its file. Also
    bounded are the modules, and the time that it takes to make them.
    """
    options = {**recipe.model_options, "pretrained": False}
    # Before any module there may be a list of all blocks.
    if not (total := sum(abs(x) for x in _numbers(options))) <= _MOST_IN_OPTIONS:
        raise _TooLarge(
            f"the numbers in model_options, {shown(dict(recipe.model_options))}, add up to {total:g}; allowed: at most "
            f"{_MOST_IN_OPTIONS:,}"
        )
    parameters = numbers = modules = calls = 0
    memory = _fit_into_memory()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal parameters, numbers
        size = 0 if tensor is None else tensor.numel()
        numbers += size
        parameters += size if isinstance(tensor, nn.Parameter) else 0
        # Checked at each one, because making very many layers takes long even without memory.
        if held is not None and parameters > 2 * held + 1024:
            raise _TooLarge(f"it holds {held:,} numbers, but describes a network of more than {parameters:,}")
        if numbers > memory:
            raise _TooLarge(
                f"{recipe.model!r} with its model_options has more than {numbers:,} numbers; this machine has memory "
                f"for {memory:,}"
            )

    def count_modules(module: nn.Module, name: str, part: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        check_time()
        if modules > _MOST_MODULES:
            raise _TooLarge(
                f"{recipe.model!r} with its model_options has too many modules; allowed: at most {_MOST_MODULES:,}"
            )

    began = time.thread_time()

    def check_time() -> None:
        if time.thread_time() - began > _MOST_SECONDS:
            raise _TooLarge(
                f"{recipe.model!r} with its model_options takes too long to make; allowed: {_MOST_SECONDS} seconds"
            )

    # For code that makes no modules. If that code happens to catch the error, there is no second one.
    def watch(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 1024 == 0:
            check_time()

    described = replace(recipe, model_options=options)
    with contextlib.ExitStack() as stack:
        for hook in (
            register_module_parameter_registration_hook(count),
            register_module_buffer_registration_hook(count),
            register_module_module_registration_hook(count_modules),
        ):
            stack.callback(hook.remove)
        if sys.getprofile() is None:  # a profiler has the only place for it
            sys.setprofile(watch)
            stack.callback(sys.setprofile, None)
        with torch.device("meta"):
            float_network(described, classes, channels)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        if isinstance(value, int | float):
            yield value
        return
    for item in value:
        yield from _numbers(item)


def _fit_into_memory() -> int:
    """How many float32 numbers fit into the memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):
        return 2**40


_Size = Annotated[int, Allowed(f"1 to {_LARGEST}", lambda n: 1 <= n <= _LARGEST)]
_IMAGE = Allowed(f"[C, H, W], each 1 to {_LARGEST}", lambda s: len(s) == 3 and all(1 <= n <= _LARGEST for n in s))


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The header of a weights file: ``recipe`` as data, ``image`` is ``[C, H, W]``."""

    format: int
    recipe: Mapping[str, Any]
    classes: _Size
    image: Annotated[tuple[int, ...], _IMAGE]
    preprocessing: Preprocessing | None = None
    card: Mapping[str, Any] = field(default_factory=dict)


def _read_header(header: Mapping[str, Any], path: str | Path) -> _Header:
    if header.get("kind") == "packed":
        raise InvalidData(
            f"{path} is a packed network, which bonn_qat.PackedModel.load and the commands evaluate and predict read; "
            "here the weights file that it was packed from is needed"
        )
    if "recipe" not in header:
        raise InvalidData(
            f"{path} does not describe the network of its weights: an earlier version of bonn-qat wrote it, or "
            "another program; build the network yourself and call load_state_dict, or train it again"
        )
    if "stage" in header:
        raise InvalidData(f"{path} is the checkpoint of an unfinished run; the same command resumes it")
    if header.get("format") != WEIGHTS_FORMAT:
        raise InvalidData(
            f"{path} is of format {shown(header.get('format'))}; this version of bonn-qat reads {WEIGHTS_FORMAT}"
        )
    return read_own(_Header, header, f"{path} is not a weights file")
