"""Objective: the task's loss and the regularizers as one module; and parameter groups for the optimizer."""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pluggy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bonn_qat import distributed, plugins
from bonn_qat.errors import BonnQatError, InvalidData, InvalidModel, InvalidRecipe, TrainingDiverged, check_model
from bonn_qat.layers import BinaryLayer
from bonn_qat.quantizers import ParameterRule, Quantizer, WeightQuantizer
from bonn_qat.regularizers import Regularizer, check_range, class_indices, described, may_look, tensor_quant
from bonn_qat.scheme import Scheme


class Losses(NamedTuple):
    """The result of a step: the sum to minimise, the model's output, and the weighted terms by name.

    The output is what the model returned: logits ``(B, classes)`` of a classifier, or whatever the task understands.
    """

    total: Tensor
    logits: Any
    terms: dict[str, Tensor]


class CrossEntropy(nn.CrossEntropyLoss):
    """torch's cross entropy, the default task, which says in one line which logits and targets it takes.

    Logits are ``(B, classes, ...)``, targets class indices ``(B, ...)`` of any integer type or bool, where
    ``ignore_index`` (-100) is left out, or class probabilities like the logits, such as Mixup's.

    Raises InvalidModel for other logits, InvalidData for other targets. Values of targets are checked on a CPU:
    indices out of range, and probabilities that are negative or do not sum to 1. On another device, which would have to
    be waited for, only the probabilities of the first call are.

    >>> CrossEntropy()(torch.zeros(2, 4), torch.tensor([3, 1], dtype=torch.uint8))
    tensor(1.3863)
    """

    _waited = False  # for the probabilities of the first call

    def forward(self, input: Any, target: Any) -> Tensor:
        if not isinstance(input, Tensor) or input.ndim < 2 or input.shape[1] < 2:
            raise InvalidModel(
                f"cross entropy needs logits (B, classes) of at least 2 classes; the model returned "
                f"{described(input)}; give a task for such outputs: Objective(model, task)"
            )
        if isinstance(target, Tensor) and target.is_floating_point() and target.shape == input.shape:
            if may_look(target) or not (self._waited or torch.compiler.is_compiling()):
                _check_probabilities(target.detach())
                self._waited = True
            return super().forward(input, target)
        shape = (input.shape[0], *input.shape[2:])
        indices = class_indices(target, shape)
        if indices is None:
            raise InvalidData(
                f"cross entropy needs class indices {shape}, whole numbers, or probabilities {tuple(input.shape)}; got "
                f"{described(target)}; give a task for such targets: Objective(model, task)"
            )
        check_range(indices, input.shape[1], ignored=self.ignore_index)
        return super().forward(input, indices)


def _check_probabilities(target: Tensor) -> None:
    """Raise InvalidData unless ``target`` ``(B, classes, ...)`` holds probabilities, but for the rounding of a type."""
    sums = target.sum(1, dtype=torch.float32)
    wrong = ~((sums - 1).abs() <= max(1e-3, 4 * torch.finfo(target.dtype).eps)) | (target < 0).any(1)
    if wrong.any():
        row = target.movedim(1, -1)[wrong][0]
        raise InvalidData(
            f"cross entropy takes targets like the logits as probabilities, at least 0 and with a sum of 1; got values "
            f"from {row.min():g} to {row.max():g} with a sum of {row.sum():g}; give a task for such targets: "
            "Objective(model, task)"
        )


def _regularizers(model: nn.Module) -> Mapping[str, float]:
    records = (vars(module).get("binarization") for module in model.modules())
    schemes = [scheme for record in records if isinstance(scheme := getattr(record, "scheme", None), Scheme)]
    for other in schemes[1:]:
        if other.regularizers != schemes[0].regularizers:
            raise InvalidModel(
                f"parts of {type(model).__name__} are binarized with {schemes[0].name} and {other.name}, which have "
                "other losses; name them: Objective(model, regularizers={NAME: WEIGHT})"
            )
    return schemes[0].regularizers if schemes else {}


class Objective(nn.Module):
    """Model, task loss and regularizers in one forward pass: ``objective(images, targets).total.backward()``.

    ``task`` maps (output of the model, targets) to a scalar, by default :class:`CrossEntropy`. Outputs and targets may
    be anything that it understands: several outputs, soft targets, several labels per image. The feature loss is the
    exception: it needs class indices. ``regularizers`` maps names to weights, by default those of the scheme with which
    the model, or a part of it, was binarized; ``options`` maps names to further keyword arguments, such as
    ``{"kernel": {"nu": 1e-3}}``. Since the regularizers run inside ``forward``, wrapping the Objective in
    DistributedDataParallel synchronizes their parameters too.

    A sign turns NaN into -1, so a binary network trains on with a finite loss after one NaN has spoilt its norms. Each
    call therefore notes, without waiting for the device, whether images, inputs of binary layers and loss terms are
    finite. On a CPU the call raises at once; otherwise, and in several processes, :meth:`check_finite` does.

    ``distillation`` is a task of timm for this model, such as ``timm.task.LogitDistillationTask(model, teacher)``: it
    runs the model and computes the task's loss, and ``task`` is not used. It is not a submodule: the teacher's
    parameters are not the Objective's, and you move it to its device yourself.

    Under autocast, losses are in float32: the task gets the model's outputs in it, and the regularizers are computed
    without autocast.

    Raises UnknownName for an unknown regularizer, InvalidRecipe for options that it does not take, and InvalidModel for
    a model without the one classifier that the feature loss needs, or of parts whose schemes have other losses. A call
    raises what its task and regularizers raise, InvalidModel for a task whose loss is no scalar, and on a CPU what
    :meth:`check_finite` raises.

    >>> from bonn_qat import binarize
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    >>> sorted(Objective(binarize(net))(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])).terms)
    ['feature', 'kernel', 'task']
    """

    def __init__(
        self,
        model: nn.Module,
        task: Callable[[Any, Any], Tensor] | None = None,
        *,
        regularizers: Mapping[str, float] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        distillation: nn.Module | None = None,
        pm: pluggy.PluginManager | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        if regularizers is None:
            regularizers = _regularizers(model)
        self.model = model
        self.task = CrossEntropy() if task is None else task
        self._distillation = (distillation,)  # a tuple, because a module would be registered as a submodule
        if distillation is not None:
            model.register_forward_hook(_widen)
        self.regularizers = nn.ModuleDict()
        for name, weight in regularizers.items():
            make: Callable[..., Regularizer] = plugins.find_regularizer(name, pm)
            try:
                self.regularizers[name] = make(model, weight=weight, **(options or {}).get(name, {}))
            except BonnQatError:
                raise
            except (TypeError, ValueError) as error:
                raise InvalidRecipe(f"the options of the regularizer {name!r} do not fit: {error}") from error

        self._inputs = _Inputs()
        self._layers = [name for name, layer in model.named_modules() if isinstance(layer, BinaryLayer)]
        for name in self._layers:
            model.get_submodule(name).watch = functools.partial(self._inputs.see, name)  # type: ignore[assignment]
        inputs = [f"the input of {name}" for name in self._layers]
        self._watched = ["the images", *inputs, *(f"the loss term {name!r}" for name in ("task", *self.regularizers))]
        held = {name: tensor for name, tensor in self.named_buffers() if not tensor.is_meta}
        # The shapes of the buffers that are no masks; what is registered later, or gets another shape, may be one.
        self._finite = {name: tensor.shape for name, tensor in held.items() if not tensor.isinf().any()}
        # Steps so far, and the first one in which each of the watched was not finite, 0 for none.
        self.steps: Tensor
        self._first: Tensor
        device = next((parameter.device for parameter in model.parameters()), None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        first = torch.zeros(len(self._watched), dtype=torch.int64, device=device)
        self.register_buffer("_first", first, persistent=False)
        # They are this process' own. DistributedDataParallel would replace them by those of rank 0.
        self._ddp_params_and_buffers_to_ignore = ["steps", "_first"]

    def forward(self, images: Any, targets: Any) -> Losses:
        (distillation,) = self._distillation
        self._inputs.sums = {}
        if distillation is None:
            output = in_float32(self.model(images))
            terms = {"task": self.task(output, targets)}
        else:
            result = distillation(images, targets)
            output, terms = result["output"], {"task": result["loss"]}
        sums, self._inputs.sums = self._inputs.sums, None
        with torch.autocast(self._first.device.type, enabled=False):
            for name, regularizer in self.regularizers.items():
                if regularizer.weight:
                    terms[name] = regularizer(targets)
        if not isinstance(terms["task"], Tensor) or terms["task"].ndim:
            raise InvalidModel(f"the task returned {described(terms['task'])}; it must return a scalar tensor")
        self._note(images, sums, terms)
        return Losses(torch.stack(list(terms.values())).sum(), output, terms)

    @torch.no_grad()
    def _note(self, images: Any, inputs: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        """Note what is not finite in this step, on the device."""
        zero, device = self.steps.new_zeros((), dtype=torch.float32), self._first.device
        found = [_sum(images) if isinstance(images, Tensor) else zero]
        found += [inputs.get(name, zero) for name in self._layers]
        found += [terms.get(name, zero) for name in ("task", *self.regularizers)]
        wrong = ~torch.stack([value if value.device == device else value.to(device) for value in found]).isfinite()
        self.steps += 1
        looks = may_look(wrong)
        if looks and not wrong.any():
            return
        self._first.copy_(torch.where(wrong & (self._first == 0), self.steps, self._first))
        if looks and distributed.world() == 1:
            self.check_finite(tensors=False)

    @torch.no_grad()
    def check_finite(self, *, tensors: bool = True) -> None:
        """Raise if anything has been NaN or infinite in a step so far; call it after each epoch and before saving.

        It looks at what the steps have noted and, with ``tensors``, at every parameter and buffer, and waits for the
        device. In a process group all processes must call it together; they raise together.

        Raises InvalidData naming the step for images, TrainingDiverged naming layer and step for inputs of binary
        layers and loss terms, and TrainingDiverged naming a parameter or buffer. A buffer that held infinity when the
        Objective was made, such as an attention mask, may hold it, and so may one that is registered, or gets another
        shape, in a forward pass.
        """
        if not tensors and distributed.world() == 1 and not self._first.any():
            return
        firsts = torch.stack(distributed.all_gather(self._first))
        unseen = torch.iinfo(firsts.dtype).max
        steps: list[int] = torch.where(firsts == 0, unseen, firsts).amin(0).tolist()
        step = min(steps)
        if step == unseen and not tensors:
            return
        self._first.zero_()
        found = [name for name, first in zip(self._watched, steps, strict=True) if first == step < unseen]
        masks = {name for name, tensor in self.named_buffers() if self._finite.get(name) != tensor.shape}
        tensor = non_finite(self, masks)
        if not found and tensor is None:
            return
        inputs = [name for name in found if name.startswith("the input of")]
        causes = found[:1] + inputs[:1] if "the images" in found else inputs[:1] or found[:1]
        parts = [f"{' and '.join(causes)} held NaN or infinity in step {step}"] if found else []
        parts += [f"{tensor} holds NaN or infinity"] if tensor else []
        if "the images" in found:
            raise InvalidData(f"{'; '.join(parts)}; remove such images")
        raise TrainingDiverged(f"{'; '.join(parts)}; try a lower learning rate")

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the weights of the regularizers; those not named, or 0, are off and their parameters frozen."""
        for name, regularizer in self.regularizers.items():
            regularizer.weight = weights.get(name, 0.0)  # type: ignore[assignment]
            regularizer.requires_grad_(bool(regularizer.weight))


def in_float32(output: Any) -> Any:
    """A model's ``output``, or tuples, lists and tables of it, in float32 where autocast has made it smaller.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     in_float32(nn.Linear(2, 2)(torch.ones(1, 2))).dtype
    torch.float32
    """

    def widened(tensor: Tensor) -> Tensor:
        is_small = tensor.is_floating_point() and tensor.element_size() < 4
        return tensor.float() if is_small and torch.is_autocast_enabled(tensor.device.type) else tensor

    return tree_map_only(Tensor, widened, output)


def _widen(module: nn.Module, inputs: Any, output: Any) -> Any:
    return in_float32(output)


class _Inputs:
    """Watches the binary layers: keeps the sum of each layer's input while ``sums`` is a table."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] | None = None

    def see(self, name: str, x: Tensor) -> None:
        if self.sums is not None:
            before, own = self.sums.get(name), _sum(x)
            self.sums[name] = own if before is None else before + own


def _sum(values: Tensor) -> Tensor:
    # One pass, and finite only if all values are. Not the largest, because that takes torch many times as long. A sum
    # in another dtype costs a copy; bfloat16 has the range of float32, in which torch adds it up.
    return values.detach().sum(dtype=torch.float32 if values.dtype == torch.float16 else None)


@torch.no_grad()
def non_finite(module: nn.Module, masks: Container[str] = ()) -> str | None:
    """The first parameter or buffer of ``module`` that holds NaN or infinity, in words; in all processes of a group.

    Buffers in ``masks`` may hold infinity. Waits for the device once.

    >>> non_finite(nn.Linear(2, 2).requires_grad_(False).apply(lambda layer: layer.bias.fill_(float("nan"))))
    'the parameter bias'
    """
    check_model(module)
    tensors: dict[str, Tensor] = {f"the parameter {name}": value for name, value in module.named_parameters()}
    tensors |= {f"the buffer {name}": buffer for name, buffer in module.named_buffers()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.is_meta}
    if not tensors:
        return None
    flags = []
    for name, tensor in tensors.items():
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # what FSDP2 has sharded
        flags.append(own.isnan().any() if name.removeprefix("the buffer ") in masks else ~own.isfinite().all())
    device = flags[0].device
    counts = distributed.all_reduce(torch.stack([flag.to(device).float() for flag in flags])).tolist()
    first = next((name for name, count in zip(tensors, counts, strict=True) if count), None)
    return first and first.replace(" model.", " ", 1)


def parameter_groups(
    *modules: nn.Module,
    lr: float,
    weight_decay: float,
    modulation_lr_scale: float = 0.1,
    modulation_decay_scale: float = 1.0,
    norm_decay: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an Objective, or for a model and its regularizers.

    BONN's modulation w and the kernel loss' sigma learn at ``modulation_lr_scale`` times ``lr``, as in the paper's
    ImageNet setting. The latent weights and the float layers decay, w by ``modulation_decay_scale`` times
    ``weight_decay``; mu, sigma and the class spreads do not. The paper says nothing about the other parameters: norms,
    biases, PReLU slopes and scales that schemes learn decay if ``norm_decay`` is true, as in the training code of wide
    residual networks, and by default do not.

    >>> [group["lr"] for group in parameter_groups(nn.Linear(2, 2), lr=0.1, weight_decay=1e-4)]
    [0.1, 0.1]
    """
    groups: dict[ParameterRule, list[nn.Parameter]] = {}
    for rule, parameter in _rules(modules, norm_decay):
        groups.setdefault(rule, []).append(parameter)
    result = []
    for rule, parameters in groups.items():
        rate, decay = (modulation_lr_scale, modulation_decay_scale) if rule.slow else (1.0, 1.0)
        decay = weight_decay * decay if rule.decay else 0.0
        result.append({"params": parameters, "lr": lr * rate, "weight_decay": decay})
    return result


def _rules(modules: Iterable[nn.Module], norm_decay: bool) -> Iterator[tuple[ParameterRule, nn.Parameter]]:
    seen: set[int] = set()
    for root in modules:
        check_model(root)
        for module in root.modules():
            rules: Mapping[str, ParameterRule] = getattr(type(module), "parameter_rules", {})
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield rules.get(name, ParameterRule(decay=norm_decay or parameter.ndim > 1)), parameter


@torch.no_grad()
def constrain_(model: nn.Module) -> None:
    """Apply the constraints of the schemes to the latent weights, in place; call it after each optimizer step.

    BNN clips them to [-1, 1]; most schemes have no constraint. Works on Brevitas' layers with our quantizers too.
    ``optimizer.register_step_post_hook(lambda *_: bonn_qat.constrain_(model))`` calls it for you.
    """
    check_model(model)
    for layer in model.modules():
        quantizer = tensor_quant(layer)
        if isinstance(layer, BinaryLayer):
            layer.constrain()
        elif isinstance(quantizer, WeightQuantizer):
            quantizer.constrain(layer.weight)  # type: ignore[arg-type]


def advance(model: nn.Module, progress: float) -> None:
    """Tell the quantizers of ``model`` which part of the training is done, 0 to 1; call it before each epoch.

    The estimators of IR-Net, ReCU and AdaBin have a schedule; most schemes have none. Raises ValueError for a
    ``progress`` outside 0 to 1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is the part of the training that is done, 0 to 1; got {progress}")
    check_model(model)
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.advance(progress)
