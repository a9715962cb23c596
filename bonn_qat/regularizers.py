"""Regularizers: losses that are added to the task's, each a module with its own parameters and buffers.

In a training loop: ``loss = task + kernel() + feature(targets)``, or all of it by :class:`bonn_qat.Objective`. The
symbols are those of :mod:`bonn_qat.functional`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from bonn_qat import distributed, functional
from bonn_qat.errors import InvalidData, InvalidModel, InvalidRecipe, check_model
from bonn_qat.heads import classifier as find_classifier
from bonn_qat.modes import modes
from bonn_qat.quantizers import ParameterRule, WeightQuantizer, number

_STACKED = 2**17  # elements


class Step(NamedTuple):
    """One training step: the task's targets, and for the losses of the features the classifier's input ``(B, D)``.

    Of a classifier that is called N times in a pass both are N times as long. With a target for each pixel, each pixel
    is one of the B samples.
    """

    targets: Any
    features: Tensor | None


class _Tap:
    """Forward hooks that keep the inputs of the classifier in one pass until they are taken; a copy starts empty."""

    def __init__(self) -> None:
        self._features: list[Tensor] = []
        self._within = False

    def begin(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features, self._within = [], True

    def end(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._within = False

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given = next(iter((*inputs, *named.values())))
        given = getattr(given, "value", given)  # of a Brevitas QuantTensor
        self._features = [*self._features, given] if self._within else [given]

    def take(self) -> list[Tensor]:
        """The inputs ``(B, ...)`` of each call."""
        features, self._features = self._features, []
        if not features:
            raise InvalidModel(
                "no features: the layer that was the classifier when the feature loss was made was not called; make "
                "the loss after the last change of the head, before torch.compile first runs the model, and call it "
                "once after each forward pass"
            )
        return features

    def __reduce__(self) -> tuple[type["_Tap"], tuple[()]]:
        return (_Tap, ())


class Regularizer(nn.Module, ABC):
    """A loss term of a model. A subclass has a ``name``, by which recipes choose it, and a method :meth:`loss`.

    Called after a forward pass, it returns ``weight * loss(step)``, a scalar; :class:`bonn_qat.Objective` leaves out a
    term whose ``weight`` is 0. Keyword-only arguments of a subclass's ``__init__`` are its options.

    ``self.model`` is the binarized model. It is not a submodule: its parameters are not the regularizer's, and in a
    deep copy of an Objective it is the copied model.

    >>> class Shrink(Regularizer):
    ...     name = "shrink"
    ...     def loss(self, step):
    ...         return sum(layer.weight.square().sum() for layer in binary_weight_layers(self.model).values())
    """

    name: ClassVar[str]
    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {}

    def __init__(self, model: nn.Module, *, weight: float) -> None:
        super().__init__()
        check_model(model)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of a regularizer must be at least 0; got {weight}")
        self.weight = weight
        self._model = (model,)  # a tuple, because a module would be registered as a submodule

    @property
    def model(self) -> nn.Module:
        """The model that the loss belongs to."""
        return self._model[0]

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """The term without its weight; a scalar tensor."""

    def forward(self, targets: Any = None) -> Tensor:
        loss = self.loss(self._step(targets))
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise InvalidModel(f"the regularizer {self.name!r} returned {got}; loss(step) must return a scalar tensor")
        return self.weight * loss

    def _step(self, targets: Any) -> Step:
        return Step(targets, None)

    def start(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Prepare at the start of each stage that uses the term; ``batches`` is one pass over the training set."""


@final
class KernelLoss(Regularizer):
    """BONN's Bayesian kernel loss: ``lambda/2`` times the first sum of (9), over all binary layers.

    Works on every layer with a ``weight`` and a 1-bit ``weight_quant``: those of :func:`binarize` and
    Brevitas' own. Without a learned modulation the quantizer's scale takes its place, as a constant.
    ``mu`` and ``sigma``, ``(all kernels,)``, start at the mean of ``|X_i|`` and the standard deviation of X_i, or with
    ``spread="magnitudes"`` that of ``|X_i|``, to which (18) converges; they start anew when the model has loaded float
    weights. Before each use sigma is clamped to at least ``min_sigma``: with smaller values the gradient step would
    overshoot.

    (17) and (18) are the derivatives of (9) divided by the number of elements of a kernel. ``per_element=False`` leaves
    out that division, so that mu and sigma learn faster by that factor.

    Call it as ``kernel()``. Raises InvalidModel for a model without binary weights, InvalidRecipe for an impossible
    value of an option.
    """

    name = "kernel"
    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {
        "mu": ParameterRule(decay=False),
        "sigma": ParameterRule(slow=True, decay=False),
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1e-4,
        nu: float = 1e-4,
        min_sigma: float = 1e-3,
        spread: Literal["weights", "magnitudes"] = "weights",
        per_element: bool = True,
    ) -> None:
        super().__init__(model, weight=weight)
        _check(number(nu) >= 0, "nu of the kernel loss", nu, "a number of at least 0")
        _check_sigma("kernel", min_sigma)
        _check(spread in ("weights", "magnitudes"), "spread of the kernel loss", spread, "'weights' or 'magnitudes'")
        _check(isinstance(per_element, bool), "per_element of the kernel loss", per_element, "true or false")
        self.nu, self.min_sigma, self.per_element = nu, min_sigma, per_element
        # A tuple, because modules would be registered as submodules.
        self._layers = tuple(binary_weight_layers(model).values())
        if not self._layers:
            raise InvalidModel(f"no binary weights in {type(model).__name__}; binarize it before making the loss")
        self._kernels: list[int] = [len(latent_weights(layer)) for layer in self._layers]
        self.spread = spread
        self.mu, self.sigma = map(nn.Parameter, self._starts())
        self._adoptions = self._count_adoptions()

    def _starts(self) -> tuple[Tensor, Tensor]:
        latents = [latent_weights(layer).detach().flatten(1) for layer in self._layers]
        spreads = latents if self.spread == "weights" else [x.abs() for x in latents]
        deviations = [x.std(1, correction=min(1, x.shape[1] - 1)) for x in spreads]  # 0 for kernels of one element
        return torch.cat([x.abs().mean(1) for x in latents]), torch.cat(deviations).clamp(min=self.min_sigma)

    def _count_adoptions(self) -> int:
        return sum(getattr(layer, "adoptions", 0) for layer in self._layers)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._adoptions = self._count_adoptions()

    def loss(self, step: Step) -> Tensor:
        with torch.no_grad():
            if self._adoptions != self._count_adoptions():  # float weights were loaded since
                for parameter, start in zip((self.mu, self.sigma), self._starts(), strict=True):
                    parameter.copy_(start)
                self._adoptions = self._count_adoptions()
            self.sigma.clamp_(min=self.min_sigma)
        stacks: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = {}
        kernels = zip(self._layers, *(torch.split(x, self._kernels) for x in (self.mu, self.sigma)), strict=True)
        for layer, mu, sigma in kernels:
            latent = latent_weights(layer)
            if not hasattr(layer, "latent"):  # Brevitas' quantizers may clamp it before the backward pass
                latent = latent.clone()
            modulation, magnitude = _modulation(tensor_quant(layer), latent)
            key = latent.shape, modulation.shape, magnitude
            stacks.setdefault(key, []).append((latent, modulation, mu, sigma))
        terms = []
        for (shape, _, magnitude), members in stacks.items():
            # Small layers of one shape are stacked, because the number of operations dominates their time; large ones
            # are not, because they would no longer fit into the cache.
            most = max(1, _STACKED // math.prod(shape))
            for stack in (members[i : i + most] for i in range(0, len(members), most)):
                columns = zip(*stack, strict=True)
                parts = stack[0] if len(stack) == 1 else [torch.stack(column) for column in columns]
                scale = parts[1] if magnitude == "scale" else parts[0].new_ones(()) if magnitude == "one" else None
                loss = functional.kernel_loss(*parts, nu=self.nu, scale=scale, per_element=self.per_element)
                terms.append(loss)
        return torch.stack(terms).sum()


class _ClassCentres(Regularizer):
    """The base of the two feature losses: the tap, the centres, and the rule that updates them."""

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float,
        classifier: str | None,
        num_classes: int | None,
        alpha: float,
        ignore_index: int | None,
    ) -> None:
        super().__init__(model, weight=weight)
        _check(number(alpha) >= 0, f"alpha of the {self.name} loss", alpha, "a number of at least 0")
        if classifier is None:
            name, head = find_classifier(model)
        else:
            name, head = classifier, model.get_submodule(classifier)  # type: ignore[assignment]
        features = getattr(head, "in_features", None) or getattr(head, "in_channels", None)
        classes = num_classes or getattr(head, "out_features", None) or getattr(head, "out_channels", None)
        if not isinstance(features, int) or not isinstance(classes, int):
            raise InvalidModel(
                f"the classifier {name!r} is a {type(head).__name__}; a Linear or Conv2d layer is needed"
            )
        is_index = ignore_index is None or type(ignore_index) is int
        _check(is_index, f"ignore_index of the {self.name} loss", ignore_index, "a whole number")
        self.alpha, self.ignore_index = alpha, ignore_index
        self._axis = -1 if isinstance(head, nn.Linear) else 1  # of the features in the classifier's input
        self._tap = _Tap()
        model.register_forward_pre_hook(self._tap.begin)
        model.register_forward_hook(self._tap.end)
        head.register_forward_pre_hook(self._tap, with_kwargs=True)
        self.centres: Tensor
        self.register_buffer("centres", torch.zeros(classes, features, device=head.weight.device))

    def _step(self, targets: Any) -> Step:
        calls = self._tap.take()
        if isinstance(targets, Tensor) and all(_is_dense(call, targets) for call in calls):
            maps = [call.movedim(self._axis, 1) for call in calls]
            labels = torch.cat([nearest(targets, x.shape[2:]).flatten() for x in maps])
            return Step(labels, torch.cat([x.movedim(1, -1).flatten(0, -2) for x in maps]))
        calls = [call.flatten(1) for call in calls]
        if len(calls) == 1:
            return Step(targets, calls[0])
        shape = (len(targets) if isinstance(targets, Tensor) and targets.ndim else None, self.centres.shape[1])
        if any(call.shape != shape for call in calls):
            raise InvalidModel(
                f"the classifier is called {len(calls)} times in a forward pass, with "
                f"{' and '.join(str(tuple(call.shape)) for call in calls)}; for the {self.name} loss each call needs "
                f"one vector of {shape[1]} features for each target; got targets {described(targets)}"
            )
        return Step(torch.cat([targets] * len(calls)), torch.cat(calls))

    def _inputs(self, step: Step) -> tuple[Tensor, Tensor]:
        """Features ``(B, D)`` and class indices ``(B,)`` in the types that the loss computes with."""
        targets, features = step
        if targets is None or features is None:
            raise InvalidData(f"the {self.name} loss needs the targets: {self.name}(targets)")
        if features.shape[1] != self.centres.shape[1]:
            raise InvalidModel(
                f"the {self.name} loss needs one vector of {self.centres.shape[1]} features for each image; the input "
                f"of the classifier has {features.shape[1]} numbers for each: it is used at several places of an "
                f"image, which takes a target for each, such as (B, H, W); got {described(targets)}"
            )
        indices = class_indices(targets, features.shape[:1])
        if indices is None:
            raise InvalidData(
                f"the {self.name} loss needs class indices ({len(features)},), whole numbers, of which negative ones "
                f"belong to no class; got {described(targets)}; with Mixup's targets, several labels per image or a "
                "regression leave it out: regularizers={'kernel': 1e-4}"
            )
        if self.ignore_index is not None:
            indices = indices.masked_fill(indices == self.ignore_index, -1)
        check_range(indices, len(self.centres), ignored=None)
        return features.to(self.centres.dtype), indices

    @torch.no_grad()
    def _move_centres(self, features: Tensor, targets: Tensor) -> None:
        numerator, counts = functional.centre_update(features, targets, self.centres)
        self.centres -= self.alpha * distributed.all_reduce(numerator) / (1 + distributed.all_reduce(counts))

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Set the centres to the class means over ``batches``; returns the standard deviations and the counts.

        They are ``(M, D)`` and ``(M, 1)``. In a process group, ``batches`` is this process' shard.
        """
        count = torch.zeros_like(self.centres[:, :1], dtype=torch.float64)
        total, squares = (torch.zeros_like(self.centres, dtype=torch.float64) for _ in range(2))
        with modes(self.model):
            for images, targets in batches:
                self.model(images)
                features, targets = self._inputs(self._step(targets))
                known, own, features = (targets >= 0).double()[:, None], targets.clamp(min=0), features.double()
                count.index_add_(0, own, known)
                total.index_add_(0, own, features * known)
                squares.index_add_(0, own, features.square() * known)
        count, total, squares = map(distributed.all_reduce, (count, total, squares))
        means = total / count.clamp(min=1)
        self.centres.copy_(means)
        return (squares / count.clamp(min=1) - means.square()).clamp(min=0).sqrt().to(self.centres.dtype), count


@final
class FeatureLoss(_ClassCentres):
    """BONN's Bayesian feature loss: ``theta/2`` times the second sum of (9), averaged over the batch.

    The features are the input of the classifier, ``(B, D)``. With a target for each pixel ``(B, H, W)``, as in
    segmentation, the input ``(B, D, H, W)`` of a convolution has a feature vector at each pixel, and each pixel is a
    sample: the sum runs over all pixels of all images, divided by their number, without those that belong to no class.
    A large image or a frequent class so counts as much as it has pixels, as in the mean of cross entropy. Targets of
    another resolution are read at the middle of each pixel of the features (``nearest``). The same holds for any
    number of axes: a Linear on tokens ``(B, N, D)`` takes targets ``(B, N)``.

    If the classifier is called several times in a forward pass, as for two views of the images or at two resolutions,
    each call counts, with the same targets. The class centres are updated by the rule of the center loss with rate
    ``alpha`` at each call in training mode; the class spreads ``sigma``, ``(classes, D)``, are parameters, clamped to
    at least ``min_sigma`` before each use. The paper fine-tunes with this loss: call ``start(batches)`` first, which
    measures both on the training set: the spread of each class or, with ``spread="all"``, the same of all images for
    every class.

    (9) is a sum, and the paper does not say that it is divided by the batch size, as the first author's center loss is.
    ``reduction="sum"`` adds up the images of the batch, in a process group those of all processes, so that theta counts
    as many times as there are images.

    Call it as ``feature(targets)`` after the forward pass, and create it before ``torch.compile`` first runs the model,
    because compiled code does not see later hooks. Targets are class indices of any integer type or bool; a sample with
    a negative one, such as the ``ignore_index`` of cross entropy, belongs to no class and is left out, and so is one
    with ``ignore_index``, such as the 255 of segmentation's borders.

    Raises InvalidModel if the classifier cannot be found (name it: ``classifier="head.fc"``), InvalidData for other
    targets and, on a CPU, for an index that is not below ``num_classes``; InvalidRecipe for an impossible value of an
    option.
    """

    name = "feature"
    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {"sigma": ParameterRule(decay=False)}

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1e-3,
        classifier: str | None = None,
        num_classes: int | None = None,
        alpha: float = 0.5,
        min_sigma: float = 1e-2,
        spread: Literal["class", "all"] = "class",
        reduction: Literal["mean", "sum"] = "mean",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            model, weight=weight, classifier=classifier, num_classes=num_classes, alpha=alpha, ignore_index=ignore_index
        )
        _check_sigma("feature", min_sigma)
        _check(spread in ("class", "all"), "spread of the feature loss", spread, "'class' or 'all'")
        _check(reduction in ("mean", "sum"), "reduction of the feature loss", reduction, "'mean' or 'sum'")
        self.min_sigma, self.spread, self.reduction = min_sigma, spread, reduction
        self.sigma = nn.Parameter(torch.ones_like(self.centres))

    def start(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        spread, count = self.measure(batches)
        if self.spread == "all":
            share = count / count.sum().clamp(min=1)
            mean = (share * self.centres).sum(0)
            # The variance within the classes, and that of their means.
            variance = (share * (spread.square() + (self.centres - mean).square())).sum(0)
            spread, count = variance.sqrt().to(spread.dtype).expand_as(spread), count.sum()
        with torch.no_grad():
            # A class with fewer than two images has no spread; it keeps the default.
            self.sigma.copy_(torch.where(count > 1, spread, 1.0).clamp(min=self.min_sigma))

    def loss(self, step: Step) -> Tensor:
        features, targets = self._inputs(step)
        with torch.no_grad():
            self.sigma.clamp_(min=self.min_sigma)
        loss = functional.feature_loss(features, targets, self.centres, self.sigma, reduction=self.reduction)
        if self.reduction == "sum":
            loss = loss * distributed.world()  # because data-parallel training averages the gradients of the processes
        if self.training:
            self._move_centres(features.detach(), targets)
        return loss


@final
class CenterLoss(_ClassCentres):
    """Center loss, ``1/(2B) sum_b ||f_b - c_m||^2`` (Wen et al., ECCV 2016): the feature loss without variances."""

    name = "center"

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 8e-3,
        classifier: str | None = None,
        num_classes: int | None = None,
        alpha: float = 0.5,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            model, weight=weight, classifier=classifier, num_classes=num_classes, alpha=alpha, ignore_index=ignore_index
        )

    def start(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.measure(batches)

    def loss(self, step: Step) -> Tensor:
        features, targets = self._inputs(step)
        distances = (features - self.centres[targets.clamp(min=0)]).square().sum(1)
        loss = 0.5 * functional.mean_of_known(distances, targets)
        if self.training:
            self._move_centres(features.detach(), targets)
        return loss


def _is_dense(features: Tensor, targets: Tensor) -> bool:
    """Whether there is a whole number as a target for each place of a map."""
    is_map = targets.ndim > 1 and features.ndim == targets.ndim + 1 and len(features) == len(targets)
    return is_map and not (targets.is_floating_point() or targets.is_complex())


def nearest(targets: Tensor, size: Sequence[int]) -> Tensor:
    """``targets`` ``(B, *axes)`` in another ``size``: the target at the middle of each new pixel, as a whole number.

    >>> nearest(torch.arange(6)[None], (3,))
    tensor([[1, 3, 5]])
    """
    for axis, (old, new) in enumerate(zip(targets.shape[1:], size, strict=True), start=1):
        if old != new:
            places = (2 * torch.arange(new, device=targets.device) + 1) * old // (2 * new)
            targets = targets.index_select(axis, places)
    return targets


def class_indices(targets: object, shape: Sequence[int]) -> Tensor | None:
    """``targets`` as int64 if they are class indices of this shape, of any integer type or bool; else None.

    >>> class_indices(torch.tensor([3, 1], dtype=torch.uint8), (2,))
    tensor([3, 1])
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        return None
    return targets.long() if targets.shape == tuple(shape) else None


def may_look(tensor: Tensor) -> bool:
    """Whether reading values of ``tensor`` costs nothing: on a CPU, outside compiled code."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_range(targets: Tensor, classes: int, *, ignored: int | None) -> None:
    """Raise InvalidData for a class index that is too large, and for a negative one other than ``ignored``.

    With ``ignored=None`` every negative one is allowed. Only on a CPU, because a GPU would have to be waited for.
    """
    if not may_look(targets):
        return
    kept = targets[targets >= 0] if ignored is None else targets[targets != ignored]
    if not kept.numel():
        return
    low, high = int(kept.min()), int(kept.max())
    if low < 0 or high >= classes:
        raise InvalidData(f"labels run from {low} to {high}, the model has {classes} classes (0 to {classes - 1})")


def described(targets: object) -> str:
    """Type and shape of ``targets`` for a message."""
    if isinstance(targets, Tensor):
        return f"{str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}"
    return f"an object of type {type(targets).__name__}"


def binary_weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights a 1-bit quantizer binarizes, ours or Brevitas', by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor) and _bits(tensor_quant(module)) == 1:
            found[name] = module
    return found


def latent_weights(layer: nn.Module) -> Tensor:
    """The latent weights of a binary layer, ``(O, I, ...)``: its weight, standardized if the layer does that."""
    make: Callable[[], Tensor] | None = getattr(layer, "latent", None)
    weight: Tensor = make() if make else layer.weight  # type: ignore[assignment]
    return _whole(weight)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if FSDP2 has sharded it."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _check(holds: bool, option: str, given: object, allowed: str) -> None:
    if not holds:
        raise InvalidRecipe(f"the {option} must be {allowed}; got {given!r}")


def _check_sigma(loss: str, least: float) -> None:
    # 1 / sigma^2 of a smaller one is infinite in float32.
    _check(number(least) >= 1e-15, f"min_sigma of the {loss} loss", least, "a number of at least 1e-15")


def _bits(quantizer: Any) -> float | None:
    if isinstance(quantizer, WeightQuantizer):
        return quantizer.bits
    # Brevitas' binary and ternary quantizers hold a module that gives the bits; others are never binary.
    width = getattr(quantizer, "bit_width", None)
    return float(width()) if isinstance(width, nn.Module) else None


def _modulation(quantizer: Any, latent: Tensor) -> tuple[Tensor, Literal["mean", "one", "scale"]]:
    """The learned modulation, or else the scale, with as many axes as the latents ``(O, ...)``; and what X^ is made of.

    That is the modulation's mean, or 1 if the quantizer reads the modulation as the inverse of a scale, or the scale.
    """
    modulation = getattr(quantizer, "modulation", None)
    if modulation is not None:
        return _whole(modulation), "one" if getattr(quantizer, "reading", None) == "inverse" else "mean"
    # A clone, because Brevitas' stock quantizer clamps the latent weights that it is given.
    with torch.no_grad():
        scale = quantizer(latent.clone())[1]
    return scale.reshape(scale.shape or [1] * latent.ndim), "scale"


def tensor_quant(layer: nn.Module) -> Any:
    """The quantizer of a layer's weights, ours or the one in Brevitas' proxy; None if it has none."""
    # Looked up at each use, because Brevitas creates a new one whenever a state dict is loaded.
    proxy = getattr(layer, "weight_quant", None)
    return getattr(proxy, "tensor_quant", None if hasattr(proxy, "is_quant_enabled") else proxy)
