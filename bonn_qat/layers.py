"""Layers: the binary convolutions, the binary linear layer, and the built-in rule for what replaces a float module."""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from bonn_qat import functional
from bonn_qat.conv_types import MATRICES, conv_type
from bonn_qat.engine import operators
from bonn_qat.engine.functions import (
    Geometry,
    Norm,
    Replay,
    normalized_map,
    per_filter,
    replayed_product,
    sign_product,
)
from bonn_qat.errors import BonnQatError, InvalidModel, InvalidRecipe, PluginError, is_out_of_memory
from bonn_qat.hookspecs import hookimpl
from bonn_qat.quantizers import ActivationQuantizer, FrozenWeight, WeightQuantizer
from bonn_qat.scheme import ACTIVATIONS, EQUAL_OUTPUT, Scheme, Stage

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
BINARY = "__binary__"  # an entry by which a model tells its layers that the state dict is not a float model's


class BinaryLayer(nn.Module):
    """The base of the binary layers: ``norm -> input_quant -> product with weight_quant(latent) -> output -> bias``.

    To norm, quantizers and output module every layer is one for images: its latent weights are kernels
    ``(O, I / groups, kh, kw)``, its inputs ``(B, I, H, W)``, whatever the number of its axes. Without an
    ``input_quant`` the inputs stay float. :func:`binary_form` makes such a layer from a float one, and :meth:`enter`
    switches its quantizers for a stage of the training.

    Loading the state of a float layer, which has a weight and nothing of what binarization added, makes the layer what
    :func:`binary_form` and :meth:`adopt` would make of the float one, also as a part of any other model.
    """

    weight: Tensor
    bias: Any  # a parameter or None; torch's classes do not agree on its type
    weight_quant: WeightQuantizer
    input_quant: ActivationQuantizer | None
    output: nn.Module | None
    norm: nn.Module
    channels: ClassVar[tuple[str, str]]  # the attributes that hold the numbers of inputs and outputs
    binary_weight: bool = True
    stand_in: Callable[[Tensor], Tensor] | None = None  # replaces the activation quantizer
    # Only in a layer that standardizes its kernels: their standard deviation, in the float layer and as latents.
    kernel_std: float | None = None
    latent_std: Tensor
    watch: Callable[[Tensor], None] | None = None  # sees each input, or a tensor that is not finite if the input is not
    any_layout: bool = False  # the output may be in channels_last for contiguous inputs: a copy less
    adoptions: int = 0  # how often the layer started from float weights

    def take(self, layer: nn.Module, scheme: Scheme, normalize: bool) -> None:
        """Take over a float ``layer``'s parameters, hooks and attributes, and quantize by ``scheme``."""
        self.scheme, self._normalize = scheme, normalize
        self._float_keys = frozenset(layer.state_dict())
        self.weight, self.bias = layer.weight, layer.bias  # type: ignore[assignment]
        if conv_type(layer).standardizes:
            self.kernel_std = float(getattr(layer, "scale", 1.0))
            self.register_buffer("latent_std", self.weight.new_tensor(self.kernel_std))
        for name, value in vars(layer).items():  # attributes that a subclass adds
            self.__dict__.setdefault(name, value)
        for name, parameter in layer._parameters.items():
            if name not in self._parameters:
                self.register_parameter(name, parameter)
        for hooks in _HOOKS:
            getattr(self, hooks).update(getattr(layer, hooks))
        self._add_parts()
        self.train(layer.training)

    def _add_parts(self) -> None:
        scheme = self.scheme
        assert scheme.weight is not None
        inputs, outputs = (getattr(self, name) for name in self.channels)
        self.weight_quant = scheme.weight(self.latent().detach())
        self.input_quant = scheme.activation(inputs) if scheme.activation else None
        self.output = scheme.output(outputs) if scheme.output else None
        norm = scheme.norm(inputs) if self._normalize and scheme.norm else nn.Identity()
        self.norm = norm.to(device=self.weight.device, dtype=self.weight.dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A leaf for torch.fx, as torch's own layers are; of other modules fx would record what their forward does.
        proxy = next((x for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
        if proxy is None:
            return super().__call__(*args, **kwargs)
        tracer: Any = proxy.tracer
        path = tracer.path_of_module(self)
        return tracer.call_module(self, lambda *a, **k: tracer.create_proxy("call_module", path, a, k), args, kwargs)

    def latent(self) -> Tensor:
        """The real-valued kernels ``(O, I / groups, kh, kw)`` that ``weight_quant`` quantizes."""
        kernels = self.kernels()
        if self.kernel_std is None:
            return kernels
        flat = kernels.reshape(1, len(kernels), -1)
        eps: float = getattr(self, "eps", 1e-6)
        return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=eps).view_as(kernels) * self.latent_std

    def kernels(self) -> Tensor:
        """``weight`` as kernels ``(O, I / groups, kh, kw)``."""
        return self.weight

    def as_weight(self, kernels: Tensor) -> Tensor:
        """Kernels in the layout of ``weight``."""
        return kernels.reshape(self.weight.shape)

    @torch.no_grad()
    def constrain(self) -> None:
        """Apply the scheme's constraint to the latent weights, in place."""
        self.weight_quant.constrain(self.weight)

    @torch.no_grad()
    def adopt(self) -> None:
        """Initialize the quantizer from the float ``weight``, then rescale that to the scheme's ``latent_std``.

        With ``"equal-output"`` it gets the magnitude of :func:`equalizing`, and the quantizer starts from that.
        """
        self.adoptions += 1
        latent_std = self.scheme.latent_std
        if self.kernel_std is not None:
            self.latent_std.fill_(self.kernel_std)
        self.weight_quant.adopt(self.latent())
        if latent_std is None:
            return
        std = he_std(self.kernels()) if isinstance(latent_std, str) else latent_std
        if self.kernel_std is not None:
            self.latent_std.fill_(std)
        else:
            self.weight.copy_(functional.rescaled(self.weight, std))
        if latent_std == EQUAL_OUTPUT:
            self.weight_quant.adopt(self.latent())
            magnitude = self.weight if self.kernel_std is None else self.latent_std
            magnitude.mul_(equalizing(self.weight_quant, self.latent()))
            self.weight_quant.adopt(self.latent())

    def complete(self, state_dict: dict[str, Any], prefix: str, *, assign: bool, errors: list[str]) -> None:
        """Turn a float layer's entries of ``state_dict`` into this layer's; ``assign`` is that of the loading."""
        weight = state_dict[prefix + "weight"]
        if isinstance(self.weight_quant, FrozenWeight):
            errors.append(f"{prefix}weight is a float weight, but this layer is frozen; load it before freezing")
        elif weight.shape == self.weight.shape:
            fresh = self._started_from(
                weight.detach().clone() if assign else weight.detach().to(self.weight, copy=True)
            )
            state_dict.update({prefix + key: tensor for key, tensor in fresh.state_dict().items()
                               if key == "weight" or key not in self._float_keys})  # fmt: skip
            self.adoptions += 1
        else:  # torch reports the shape, and nothing else is missing
            state_dict.update({prefix + key: own for key, own in self.state_dict().items()
                               if key not in self._float_keys})  # fmt: skip

    def _started_from(self, weight: Tensor) -> "BinaryLayer":
        """A layer without hooks that has adopted ``weight``."""
        fresh = copy.copy(self)
        for members in ("_parameters", "_buffers", "_modules"):  # copy.copy shares these
            fresh.__dict__[members] = dict(self.__dict__[members])
        fresh.weight = nn.Parameter(weight)
        if self.kernel_std is not None:
            fresh.latent_std = weight.new_tensor(self.kernel_std)
        fresh._add_parts()
        for part in (fresh.weight_quant, fresh.input_quant, fresh.output):
            if part is not None:
                part.to(device=weight.device, dtype=weight.dtype)
        fresh.adopt()
        return fresh

    def given_float(self, state_dict: Mapping[str, Any], prefix: str) -> bool | None:
        """Whether ``state_dict`` has a float weight for this layer; None if nothing but its context can tell.

        Entries that are the layer's own, as in ``own = model.state_dict(); own.update(pretrained)``, count as absent.
        """
        own = self.state_dict()
        given = {key for key, tensor in own.items() if not is_own(state_dict.get(prefix + key), tensor)}
        added = own.keys() - self._float_keys
        return None if "weight" in given and not added else "weight" in given and added.isdisjoint(given)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any],
        strict: bool, missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        is_binary = state_dict.pop(prefix + BINARY, False)
        if not is_binary and self.given_float(state_dict, prefix):
            assign = metadata.get("assign_to_params_buffers", False)
            self.complete(state_dict, prefix, assign=assign, errors=errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep only what inference needs, in place: ``weight`` becomes the quantized one, int8 where it is a sign.

        The outputs stay the same. It cannot be undone: the latent weights are gone.
        """
        frozen, value = FrozenWeight.of(self.weight_quant, self.latent())
        self.weight = nn.Parameter(self.as_weight(value), requires_grad=False)
        self.weight_quant, self.kernel_std = frozen, None

    def enter(self, stage: Stage) -> None:
        """Quantize weights and activations as ``stage`` says."""
        self.binary_weight, self.stand_in = stage.weights == "binary", ACTIVATIONS[stage.activations]

    def forward(self, input: Tensor, norm: nn.Module | None = None, addend: Tensor | None = None) -> Tensor:
        """The layer's output, of ``norm(input)`` if a norm is given, and plus ``addend``; see :func:`step`."""
        return self._output(input, norm, addend, *self.geometry(input))

    def _output(
        self, input: Tensor, norm: nn.Module | None, addend: Tensor | None, geometry: Geometry,
        place: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        x = self.as_images(input)
        found = self._by_engine(x, norm, addend, geometry, place)
        if found is not None:
            y, is_finished = found
        else:
            if self.watch is not None:
                self.watch(x)
            x = self.norm(x if norm is None else norm(x))
            positions = None
            if self.input_quant is not None:
                if self.stand_in is not None:
                    x = self.stand_in(x)
                else:
                    x, scale = self.input_quant.quantize(x)
                    positions = place(scale) if scale.ndim == 4 else None
            y, is_finished = self.product(place(x), positions, geometry), False
        if not is_finished:
            y = self.finish(y)
            y = y if addend is None else y + addend
        return self.from_images(y, input)

    def _by_engine(
        self, x: Tensor, outer: nn.Module | None, addend: Tensor | None, geometry: Geometry,
        place: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, bool] | None:  # fmt: skip
        """The product from the engine, and whether it is finished; None if that cannot do it or would gain nothing."""
        if operators.is_traced():
            return None
        if x.ndim != 4 or x.numel() <= x.shape[1] or x.shape[1] != getattr(self, self.channels[0]):
            return None  # norm or convolution say what is wrong
        quantizer = self.input_quant if self.stand_in is None else None
        estimator = None if quantizer is None else quantizer.estimator()
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if dtype == torch.float16 and device == "cpu":
            return None
        scaled = self.binary_weight and self.weight_quant.scaled_sign
        by_bits = (
            estimator is not None and scaled and place is _unchanged and geometry.groups == 1
            and not geometry.transposed and operators.takes(x) and dtype in (torch.float32, torch.bfloat16)
            and min(geometry.size(x, self.kernels())) > 0
        )  # fmt: skip
        saves_memory = self.training and torch.is_grad_enabled() and (quantizer is None or quantizer.is_pure)
        if not by_bits and (torch.compiler.is_compiling() or not saves_memory):
            return None
        norms = [norm for norm in (outer, self.norm) if norm is not None and not is_idle(norm)]
        inner = norms.pop() if norms and is_plain_norm(norms[-1]) else None
        for norm in norms:
            x = norm(x)
        layout = torch.channels_last if self.any_layout else operators.layout(x)
        if by_bits:
            x = x.contiguous(memory_format=torch.channels_last)
        statistics = Norm.of(cast(nn.BatchNorm2d | None, inner), x)
        if self.watch is not None:  # the mean is finite only if all values are
            self.watch(statistics.mean if statistics.statistics else x)
        value, scale = self.weight_quant.quantize(self.latent()) if self.binary_weight else (self.latent(), None)
        if by_bits:
            assert estimator is not None
            assert scale is not None
            is_finished = self.output is None and getattr(self, "gain", None) is None
            if addend is not None:  # a compiler adds it to what follows, and takes no tensor twice
                is_finished = is_finished and addend.dtype == dtype and not torch.compiler.is_compiling()
                addend = addend.contiguous(memory_format=torch.channels_last) if is_finished else None
            bias: Tensor | None = self.bias if is_finished else None
            y = sign_product(x, statistics, estimator, value, scale, bias, addend, geometry, dtype, layout)
            return y, is_finished
        quantize = self.stand_in or (_unchanged if quantizer is None else quantizer.value)
        call = Replay(quantizer, quantize, place, geometry, dtype)
        return replayed_product(x, statistics, call, self.operand(value), scale if scaled else None), False

    def as_images(self, input: Tensor) -> Tensor:
        """The input ``(B, I, H, W)``."""
        return input

    def from_images(self, y: Tensor, input: Tensor) -> Tensor:
        """The output in the shape that belongs to ``input``."""
        return y

    def geometry(self, input: Tensor) -> tuple[Geometry, Callable[[Tensor], Tensor]]:
        """The convolution of an input, and what its quantized image goes through before: axes, other padding than 0."""
        raise NotImplementedError

    def operand(self, kernels: Tensor) -> Tensor:
        """Kernels as torch's operator for :meth:`geometry` takes them."""
        return kernels

    def product(self, x: Tensor, positions: Tensor | None, geometry: Geometry) -> Tensor:
        """The product of quantized inputs; times the mean of ``positions``, if given, over the kernel's windows."""
        raise NotImplementedError

    def finish(self, y: Tensor) -> Tensor:
        """Apply gain, output module and bias to the product ``(B, O, ...)``."""
        gain: Tensor | None = getattr(self, "gain", None)  # one factor per filter, of timm's ScaledStdConv2d
        y = y if gain is None else y * per_filter(gain.to(y.dtype), y)
        if self.output is not None:
            y = self.output(y) if y.ndim == 4 else self.output(y.flatten(3)).reshape(y.shape)
        return y if self.bias is None else y + per_filter(self.bias.to(y.dtype), y)


class BinaryConvolution(BinaryLayer, nn.modules.conv._ConvNd):
    """A convolution over one to three axes, or a transposed one, with binary kernels, and binary inputs if the scheme
    has them.

    One axis is the width of images of height 1; of three, the last two become one. The filter of an output channel is
    all weights that it is a sum with, in the weight ``(I, O / groups, ...)`` of a transposed convolution
    ``weight[:, o]``, so that a scale for each filter is one for each output channel.

    Kernels with two values ``+-scale`` are convolved as {-1, +1} and the result is scaled
    (:func:`~bonn_qat.functional.binary_convolution`); other kernels are used as they are.
    """

    channels = ("in_channels", "out_channels")
    same_padding: bool = False

    @classmethod
    def from_float(cls, conv: nn.modules.conv._ConvNd, scheme: Scheme, *, normalize: bool = True) -> Self:
        """A binary layer that takes over ``conv``'s parameters; ``normalize=False`` leaves the norm out."""
        copied = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                  "padding_mode", *(["output_padding"] if conv.transposed else []))  # fmt: skip
        layer = cls(**{name: getattr(conv, name) for name in copied}, bias=False, device="meta")
        layer.same_padding = conv_type(conv).same_padding
        layer.take(conv, scheme, normalize)
        return layer

    def kernels(self) -> Tensor:
        weight = _swapped(self.weight, self.groups) if self.transposed else self.weight
        return weight.unsqueeze(2) if weight.ndim == 3 else weight if weight.ndim == 4 else weight.flatten(3)

    def operand(self, kernels: Tensor) -> Tensor:
        kernels = kernels if len(self.kernel_size) < 3 else kernels.reshape(*kernels.shape[:2], *self.kernel_size)
        return _swapped(kernels, self.groups) if self.transposed else kernels

    def as_weight(self, kernels: Tensor) -> Tensor:
        return self.operand(kernels).reshape(self.weight.shape)

    @torch.no_grad()
    def constrain(self) -> None:
        kernels = self.kernels()
        self.weight_quant.constrain(kernels)
        if kernels is not self.weight:
            self.weight.copy_(self.as_weight(kernels))  # not every view shares its memory

    def as_images(self, input: Tensor) -> Tensor:
        axes = len(self.kernel_size)
        if axes != 2 and input.ndim != axes + 2:
            raise ValueError(f"expected {axes + 2}D input (got {input.ndim}D input)")  # as torch's norms say it
        return input if axes == 2 else input.unsqueeze(2) if axes == 1 else input.flatten(3)

    def from_images(self, y: Tensor, input: Tensor) -> Tensor:
        return y.squeeze(2) if len(self.kernel_size) == 1 else y

    def geometry(self, input: Tensor) -> tuple[Geometry, Callable[[Tensor], Tensor]]:
        axes = len(self.kernel_size)
        height = (1,) * (axes == 1)
        sides: Sequence[int] = [0] * 2 * axes  # as F.pad takes them: from the last axis to the first
        mode = self.padding_mode
        if self.same_padding:
            sides, mode = self._same_padding(input), "zeros"
        elif isinstance(self.padding, str) or mode != "zeros":
            sides = self._reversed_padding_repeated_twice
        else:
            sides = [side for side in reversed(self.padding) for _ in range(2)]
        sides = [*sides, *(0, 0) * len(height)]
        place: Callable[[Tensor], Tensor] = _unchanged
        if axes == 3 or mode != "zeros":
            place = functools.partial(_placed, spatial=input.shape[3:] if axes == 3 else None,
                                      sides=None if mode == "zeros" else sides, mode=mode)  # fmt: skip
        if mode != "zeros":
            sides = [0] * len(sides)
        padding = [side for end in range(len(sides), 0, -2) for side in sides[end - 2 : end]]
        return Geometry(
            (*height, *self.stride), tuple(padding), (*height, *self.dilation), self.groups, self.transposed,
            (*(0,) * len(height), *self.output_padding),
        ), place  # fmt: skip

    def product(self, x: Tensor, positions: Tensor | None, geometry: Geometry) -> Tensor:
        if self.binary_weight and self.weight_quant.scaled_sign:
            value, scale = self.weight_quant.quantize(self.latent())
            y = functional.binary_convolution(x, self.operand(value), scale, geometry)
        else:
            value = self.weight_quant.quantize(self.latent())[0] if self.binary_weight else self.latent()
            y = geometry.convolve_as_written(x, self.operand(value))
        if positions is None:
            return y
        return y * geometry.mean(positions, (*(1,) * (2 - len(self.kernel_size)), *self.kernel_size))

    def _same_padding(self, x: Tensor) -> list[int]:
        """Left, right, top, bottom for ``ceil(size / stride)`` output pixels; an odd pixel goes right or below."""
        padding: list[int] = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[-2:]), *map(reversed, (self.kernel_size, self.stride, self.dilation)), strict=True
        ):
            missing = max(0, (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            padding += [missing // 2, missing - missing // 2]
        return padding


class BinaryConv1d(BinaryConvolution, nn.Conv1d):
    """:class:`BinaryConvolution` of ``(B, I, L)``."""


class BinaryConv2d(BinaryConvolution, nn.Conv2d):
    """:class:`BinaryConvolution` of ``(B, I, H, W)``."""


class BinaryConv3d(BinaryConvolution, nn.Conv3d):
    """:class:`BinaryConvolution` of ``(B, I, D, H, W)``."""


class _BinaryConvTranspose(BinaryConvolution, nn.modules.conv._ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # type: ignore[override]
        """The layer's output, of ``output_size`` if it is given, as torch's layer takes it."""
        geometry, place = self.geometry(input)
        if output_size is not None:
            axes = len(self.kernel_size)
            stride, padding, kernel, dilation = (
                cast(list[int], x) for x in (self.stride, self.padding, self.kernel_size, self.dilation)
            )
            found = self._output_padding(input, output_size, stride, padding, kernel, axes, dilation)
            geometry = geometry._replace(output_padding=(*(0,) * (2 - len(found)), *found))
        return self._output(input, None, None, geometry, place)


class BinaryConvTranspose1d(_BinaryConvTranspose, nn.ConvTranspose1d):
    """The transposed :class:`BinaryConvolution` of ``(B, I, L)``."""


class BinaryConvTranspose2d(_BinaryConvTranspose, nn.ConvTranspose2d):
    """The transposed :class:`BinaryConvolution` of ``(B, I, H, W)``."""


class BinaryConvTranspose3d(_BinaryConvTranspose, nn.ConvTranspose3d):
    """The transposed :class:`BinaryConvolution` of ``(B, I, D, H, W)``."""


_FORMS: Mapping[type[nn.Module], type[BinaryConvolution]] = {
    nn.Conv1d: BinaryConv1d, nn.Conv2d: BinaryConv2d, nn.Conv3d: BinaryConv3d,
    nn.ConvTranspose1d: BinaryConvTranspose1d, nn.ConvTranspose2d: BinaryConvTranspose2d,
    nn.ConvTranspose3d: BinaryConvTranspose3d,
}  # fmt: skip


class BinaryLinear(BinaryLayer, nn.Linear):
    """A linear layer ``(..., I) -> (..., O)`` with binary weights, and binary inputs if the scheme has them.

    It is treated as a 1x1 convolution: norm and quantizers see each position as an image of one pixel, so that they are
    those of a convolution.
    """

    channels = ("in_features", "out_features")

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: Scheme, *, normalize: bool = True) -> "BinaryLinear":
        """A binary layer that takes over ``linear``'s parameters; ``normalize=False`` leaves the norm out."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.take(linear, scheme, normalize)
        return layer

    def kernels(self) -> Tensor:
        return self.weight[:, :, None, None]

    def as_images(self, input: Tensor) -> Tensor:
        return input.reshape(-1, self.in_features, 1, 1)

    def from_images(self, y: Tensor, input: Tensor) -> Tensor:
        return y.reshape(*input.shape[:-1], self.out_features)

    def geometry(self, input: Tensor) -> tuple[Geometry, Callable[[Tensor], Tensor]]:
        return Geometry(), _unchanged

    def product(self, x: Tensor, positions: Tensor | None, geometry: Geometry) -> Tensor:
        flat = x.flatten(1)
        if self.binary_weight and self.weight_quant.scaled_sign:
            value, scale = self.weight_quant.quantize(self.latent())
            y = functional.binary_linear(flat, value.flatten(1), scale.flatten())
        else:
            value = self.weight_quant.quantize(self.latent())[0] if self.binary_weight else self.latent()
            y = F.linear(flat, value.flatten(1))
        y = y[:, :, None, None]
        return y if positions is None else y * positions


def _unchanged(x: Tensor) -> Tensor:
    return x


def _placed(x: Tensor, spatial: Sequence[int] | None, sides: Sequence[int] | None, mode: str) -> Tensor:
    """An image with the last axes that it had, and padded."""
    x = x if spatial is None else x.reshape(*x.shape[:3], *spatial)
    return x if sides is None else F.pad(x, list(sides), mode)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """``(I, O / groups, ...) -> (O, I / groups, ...)``, and the other way round."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` is a batch norm that the engine computes and that nobody watches."""
    return type(norm) is nn.BatchNorm2d and norm.momentum is not None and not is_watched(norm)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody sees the calls of ``module``: by a hook, or by another ``forward`` in its place."""
    is_patched = "forward" in module.__dict__
    has_global: bool = bool(_has_any_global_hook())  # type: ignore[no-untyped-call]
    return is_patched or has_global or any(getattr(module, hooks) for hooks in _HOOKS)


def step(norm: nn.Module | None, layer: nn.Module, x: Tensor, addend: Tensor | None = None) -> Tensor:
    """``layer(norm(x)) + addend``, in one pass of the engine if it is a binary layer that nobody watches."""
    is_ours = isinstance(layer, BinaryLayer) and type(layer).forward is BinaryLayer.forward and not is_watched(layer)
    # Not a proxy of torch.fx.
    if is_ours and isinstance(x, Tensor):
        return layer(x, norm, addend)  # type: ignore[no-any-return]
    y = layer(x if norm is None else norm(x))
    return y if addend is None else y + addend  # type: ignore[no-any-return]


def normalized(norm: nn.Module, x: Tensor, addend: Tensor | None = None) -> Tensor:
    """``norm(x) + addend``, in one pass of the engine if it is a plain norm that nobody watches.

    x ``(B, C, H, W)``; the addend broadcasts over it. Other norms, layouts and devices take torch's operations.
    """
    is_ours = isinstance(x, Tensor) and is_plain_norm(norm)
    is_ours = is_ours and operators.takes(x) and x.is_contiguous(memory_format=torch.channels_last)
    if is_ours and x.shape[1] == norm.num_features and x.numel() > x.shape[1]:  # else the norm says what is wrong
        joins = addend is not None and addend.shape == x.shape and addend.dtype == x.dtype
        joined = addend.contiguous(memory_format=torch.channels_last) if addend is not None and joins else None
        y = normalized_map(x, Norm.of(cast(nn.BatchNorm2d, norm), x), joined)
        addend = None if joins else addend
    else:
        y = norm(x)
    return y if addend is None else y + addend


def is_idle(module: nn.Module) -> bool:
    """Whether ``module`` leaves its input as it is and nobody watches it."""
    idle = type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
    return idle and not is_watched(module)


def is_own(entry: Tensor | None, own: Tensor) -> bool:
    """Whether an entry of a state dict is missing, or the module's ``own`` tensor, which changes nothing."""
    if not isinstance(entry, Tensor):
        return entry is None
    ours, theirs = (getattr(x, "_local_tensor", x) for x in (own, entry))  # of a DTensor
    return bool(ours.device == theirs.device and ours.data_ptr() == theirs.data_ptr() and (own.is_meta or own.numel()))


def binary_form(layer: nn.Module, scheme: Scheme, *, normalize: bool = True) -> BinaryConvolution | BinaryLinear:
    """The binary layer that takes over the parameters of a convolution or a linear layer.

    Raises InvalidModel, with the reason, for a layer that cannot be binary and for a scheme that does not fit it.

    >>> from bonn_qat.plugins import find_scheme
    >>> binary_form(nn.Conv2d(3, 8, 3, bias=False), find_scheme("bonn"), normalize=False).weight.shape
    torch.Size([8, 3, 3, 3])
    """
    if scheme.weight is None:
        raise InvalidModel(f"the scheme {scheme.name!r} leaves weights float")
    try:
        conv_type(layer)
        if isinstance(layer, nn.Linear):
            return BinaryLinear.from_float(layer, scheme, normalize=normalize)
        form = next(form for kind, form in _FORMS.items() if isinstance(layer, kind))
        return form.from_float(cast(nn.modules.conv._ConvNd, layer), scheme, normalize=normalize)
    except Exception as error:  # the scheme's factories are third-party code
        if is_out_of_memory(error):
            raise
        words = str(error) if isinstance(error, BonnQatError | ValueError | RuntimeError) else repr(error)
        raise InvalidModel(f"the scheme {scheme.name!r} does not fit {layer}: {words}") from error


def he_std(kernels: Tensor) -> float:
    """``sqrt(2 / n)`` for kernels ``(O, ...)`` of n elements: the standard deviation of He's initialization."""
    return math.sqrt(2 / math.prod(kernels.shape[1:]))


@torch.no_grad()
def equalizing(quantizer: WeightQuantizer, latent: Tensor) -> Tensor:
    """The factor for ``latent`` ``(O, I, ...)`` that gives the quantized weights the root mean square :func:`he_std`.

    Random signs as inputs then give every layer outputs of the standard deviation ``sqrt(2)``, whatever the scheme. It
    is 1 if all quantized weights are 0.
    """
    root_mean_square = quantizer.quantize(latent)[0].square().mean().sqrt()
    return torch.where(root_mean_square > 0, he_std(latent) / root_mean_square, 1.0)


def check_start(scheme: Scheme) -> None:
    """Raise InvalidRecipe for the start ``"equal-output"`` of a scheme whose values do not follow its latents."""
    if scheme.latent_std != EQUAL_OUTPUT or scheme.weight is None:
        return
    latent = torch.randn(4, 3, 3, 3)
    quantizer = scheme.weight(latent)
    latent = latent * equalizing(quantizer, latent)
    quantizer.adopt(latent)
    if not torch.isclose(equalizing(quantizer, latent), torch.ones(()), rtol=1e-3):
        raise InvalidRecipe(
            f"the scheme {scheme.name!r} cannot start with the latents {EQUAL_OUTPUT!r}, because its quantized weights "
            "do not follow their scale; give it a standard deviation, such as 0.01, or 'float'"
        )


def check_contract(scheme: Scheme) -> None:
    """Raise PluginError if the quantizers of ``scheme`` return what no binary layer can use (docs/plugins.md).

    They are tried on small random tensors; an exception there is left for a real layer to raise.
    """
    weight, x = torch.randn(4, 3, 3, 3).requires_grad_(), torch.randn(2, 3, 5, 5).requires_grad_()
    for part, base, factory, source, given in (
        ("weight", WeightQuantizer, scheme.weight, weight, weight.detach()),
        ("activation", ActivationQuantizer, scheme.activation, x, 3),
    ):
        try:
            quantizer: Any = factory and cast(Any, factory)(given)
            pair: Any = quantizer.eval().quantize(source) if isinstance(quantizer, base) else None
        except (Exception, SystemExit):
            continue
        if factory and (wrong := _breach(quantizer, pair, source, base)):
            raise PluginError(f"the {part} of the scheme {scheme.name!r} {wrong}; docs/plugins.md has the contract")


def _breach(quantizer: object, pair: Any, source: Tensor, base: type) -> str:
    if not isinstance(quantizer, base):
        return f"makes a {type(quantizer).__name__}, which is not a bonn_qat.quantizers.{base.__name__}"
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)):
        return "does not return a pair of tensors (value, scale) from quantize(x)"
    value, scale = pair
    if value.shape != source.shape:
        return f"returns a value of shape {tuple(value.shape)} for x of shape {tuple(source.shape)}"
    if isinstance(quantizer, WeightQuantizer) and quantizer.scaled_sign:
        if scale.numel() != 1 and scale.shape != (len(source), 1, 1, 1):
            return (
                f"returns a scale of shape {tuple(scale.shape)} for x of shape (O, I, kh, kw); give () or (O, 1, 1, 1)"
            )
        if not torch.allclose(value.abs(), scale.abs().to(value.dtype).expand_as(value)):
            return "returns values other than scale * {-1, +1}; set scaled_sign = False in its class"
    return ""


@hookimpl(trylast=True)
def bonn_qat_binarize_layer(
    scheme: Scheme, name: str, layer: nn.Module, parent: nn.Module, channels: int
) -> nn.Module | None:
    """The built-in rule: convolutions of all kinds and linear layers become binary, ReLUs the scheme's nonlinearity.

    A block with a method ``binary_form(scheme)`` is replaced by the result. A block with the attribute
    ``normalizes_input = True`` has a norm before its convolutions already.
    """
    form: Callable[[Scheme], nn.Module] | None = getattr(layer, "binary_form", None)
    if form is not None:
        return form(scheme)
    if not isinstance(layer, BinaryLayer) and isinstance(layer, MATRICES):
        return binary_form(layer, scheme, normalize=not getattr(parent, "normalizes_input", False))
    if isinstance(layer, nn.ReLU | nn.ReLU6) and scheme.nonlinearity is not None:
        return scheme.nonlinearity(channels)
    return None
