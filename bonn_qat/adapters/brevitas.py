"""Schemes for Brevitas layers: quantizers to pass as ``weight_quant=``, ``act_quant=`` and ``input_quant=``.

>>> import brevitas.nn as qnn
>>> sign = qnn.QuantIdentity(act_quant=SignedBinaryBonnActPerTensorConst)
>>> conv = qnn.QuantConv2d(16, 32, 3, bias=False, weight_quant=SignedBinaryBonnWeightPerTensorFloat)

The tensor quantizers are the modules of :mod:`bonn_qat.quantizers`, so the losses find them. Options of a scheme's
weight quantizer are keywords of the layer: ``QuantConv2d(..., weight_granularity="plane")``. Norms, nonlinearities and
the scale of the latent weights are up to you. Every sign after a ReLU is +1, so :func:`layer_map` replaces ReLUs too.
:func:`from_brevitas` converts a model to layers of this package.

The state dict is complete from construction on, and loading one keeps every Parameter object, so optimizers stay
valid. The state dict of a float layer loads strictly: the quantizer's parameters are computed from the weights.
Brevitas models cannot be pickled, because their quantizers are nested classes: save the state dict.
"""

import copy
from collections.abc import Callable
from typing import Any

import brevitas.config
import brevitas.nn as qnn
import torch
from brevitas.inject import ExtendedInjector, value
from brevitas.loss.base_loss import SimpleBaseLoss
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor, nn

from bonn_qat.binarization.binarize import Binarization, binary_layers
from bonn_qat.binarization.policy import float_layers
from bonn_qat.bonn import BONN
from bonn_qat.errors import BonnQatError, InvalidModel
from bonn_qat.layers import BinaryLayer, binary_form
from bonn_qat.plugins import find_scheme
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer
from bonn_qat.regularizers import KernelLoss, tensor_quant
from bonn_qat.scheme import Scheme

__all__ = [
    "BonnKernelLoss",
    "SignedBinaryBonnActPerTensorConst",
    "SignedBinaryBonnWeightPerTensorFloat",
    "activation_quantizer",
    "float_layers",
    "from_brevitas",
    "layer_map",
    "skip_quant_tensors",
    "weight_quantizer",
]

# Brevitas finds export handlers by the exact type of the proxy, so only the tensor quantizer is ours.


class _Weight(ExtendedInjector):  # type: ignore[misc]
    proxy_class = WeightQuantProxyFromInjector
    signed = True
    narrow_range = True
    scheme = BONN

    @value  # type: ignore[untyped-decorator]
    def tensor_quant(scheme: Scheme, module: Any, proxy_module: Any, tracked_parameter_list: list[Tensor]) -> nn.Module:
        layers = module if isinstance(module, tuple) else (module,)
        if any(layer.output_channel_dim != 0 for layer in layers):
            raise InvalidModel(
                f"{type(layers[0]).__name__} has its output channels on axis 1; a binary layer needs them on axis 0"
            )
        assert scheme.weight is not None
        fresh = scheme.weight(tracked_parameter_list[0].detach(), **_options(proxy_module.quant_injector))
        if not fresh.scaled_sign:
            raise InvalidModel(
                f"the weights of the scheme {scheme.name!r} are not a scale times a sign, which is what Brevitas means "
                "by 1 bit; use bonn_qat.binarize"
            )
        is_owner = proxy_module.tracked_parameter_list[0] is tracked_parameter_list[0]
        return _keep_parameters(proxy_module, fresh) if is_owner else fresh


class _Activation(ExtendedInjector):  # type: ignore[misc]
    proxy_class = ActQuantProxyFromInjector
    signed = True
    narrow_range = True
    scheme = BONN

    @value  # type: ignore[untyped-decorator]
    def tensor_quant(scheme: Scheme, module: Any, proxy_module: Any) -> nn.Module:
        if brevitas.config.JIT_ENABLED:
            raise BonnQatError("BREVITAS_JIT=1: torch.jit cannot script the quantizers of bonn_qat; unset it")
        assert scheme.activation is not None
        layers = list(module) if isinstance(module, tuple) else [module]
        # A QuantIdentity does not know its channels.
        channels = getattr(layers[0], "in_channels", getattr(layers[0], "in_features", 1))
        fresh = scheme.activation(channels)
        if fresh.bits != 1:
            raise InvalidModel(
                f"the activations of the scheme {scheme.name!r} have {fresh.bits} bits; this adapter supports 1 bit; "
                "use bonn_qat.binarize"
            )
        is_owner = all(a is b for a, b in zip(layers, proxy_module.tracked_module_list, strict=True))
        return _keep_parameters(proxy_module, fresh, rederive=False) if is_owner else fresh


_WIRING = {*_Weight.__dependencies__, "module", "proxy_module", "tracked_parameter_list"}


def _options(injector: Any) -> dict[str, Any]:
    """Options of the scheme's weight quantizer, given as keywords of the layer or of the injector's ``let``."""
    return {name: getattr(injector, name) for name in injector.__dependencies__ if name not in _WIRING}


class SignedBinaryBonnWeightPerTensorFloat(_Weight):
    """BONN's weights, ``mean(w) * sign(X)`` with a learned modulation w: :class:`bonn_qat.quantizers.BonnWeight`.

    >>> conv = QuantConv2d(16, 32, 3, weight_quant=SignedBinaryBonnWeightPerTensorFloat, weight_granularity="plane")
    """


class SignedBinaryBonnActPerTensorConst(_Activation):
    """BONN's activations, ``sign`` with the clipped straight-through gradient: :class:`bonn_qat.quantizers.SteSign`.

    >>> sign = QuantIdentity(act_quant=SignedBinaryBonnActPerTensorConst)
    """


def weight_quantizer(scheme: str | Scheme) -> type[ExtendedInjector]:
    """The value for ``weight_quant=`` for any scheme.

    Raises UnknownName for an unknown scheme, InvalidModel for one that leaves weights float.

    >>> weight_quantizer("bonn").__name__
    'SignedBinaryBonnWeight'
    """
    chosen = find_scheme(scheme)
    if chosen.weight is None:
        raise InvalidModel(f"the scheme {chosen.name!r} leaves weights float, so it has no weight_quant")
    return _named(_Weight, f"SignedBinary{_camel(chosen.name)}Weight", chosen)


def activation_quantizer(scheme: str | Scheme) -> type[ExtendedInjector]:
    """The value for ``act_quant=`` and ``input_quant=`` for any scheme.

    Raises UnknownName for an unknown scheme, InvalidModel for one that leaves activations float.

    >>> activation_quantizer("bonn").__name__
    'SignedBinaryBonnAct'
    """
    chosen = find_scheme(scheme)
    if chosen.activation is None:
        raise InvalidModel(f"the scheme {chosen.name!r} leaves activations float, so it has no act_quant")
    return _named(_Activation, f"SignedBinary{_camel(chosen.name)}Act", chosen)


def layer_map(scheme: str | Scheme) -> dict[type[nn.Module], tuple[Callable[..., nn.Module], dict[str, Any]]]:
    """The ``compute_layer_map`` for ``brevitas.graph.quantize.layerwise_quantize``: convolutions, linear layers, ReLUs.

    >>> blacklist = list(float_layers(model))  # first layer, classifier, shortcuts ...
    >>> model = layerwise_quantize(model, compute_layer_map=layer_map("bonn"), name_blacklist=blacklist)

    A ReLU is replaced by the scheme's nonlinearity, with one parameter for all channels, which Brevitas does not tell.
    It compares exact classes: subclasses of ``nn.Conv2d``, such as timm's ``Conv2dSame``, stay float. Raises
    UnknownName for an unknown scheme, InvalidModel for one that leaves weights float.
    """
    chosen = find_scheme(scheme)
    arguments = {
        "weight_quant": weight_quantizer(chosen),
        "input_quant": None if chosen.activation is None else activation_quantizer(chosen),
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    layers: dict[type[nn.Module], tuple[Callable[..., nn.Module], dict[str, Any]]] = {
        nn.Conv2d: (qnn.QuantConv2d, arguments),
        nn.Linear: (qnn.QuantLinear, arguments),
    }
    nonlinearity = chosen.nonlinearity
    if nonlinearity is not None:

        def replace_relu() -> nn.Module:
            new = nonlinearity(1)
            new.register_load_state_dict_pre_hook(_complete)  # type: ignore[no-untyped-call]
            return new

        layers |= {nn.ReLU: (replace_relu, {}), nn.ReLU6: (replace_relu, {})}
    return layers


def from_brevitas(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which Brevitas layers with quantizers of this module are layers of this package.

    Weights and quantizer parameters are kept, and the outputs are the same, as plain tensors. Layers with other
    quantizers remain Brevitas layers. ``binarization`` is recorded as by :func:`bonn_qat.binarize`. Raises InvalidModel
    if no layer has such weights, or if one quantizes its input, bias or output with another quantizer.

    >>> conv = qnn.QuantConv2d(3, 8, 3, weight_quant=SignedBinaryBonnWeightPerTensorFloat)
    >>> type(from_brevitas(nn.Sequential(conv))[0]).__name__
    'BinaryConv2d'
    """
    result = copy.deepcopy(model)
    schemes: dict[str, Scheme] = {}
    done: dict[nn.Module, nn.Module] = {}
    for name, layer in list(result.named_modules(remove_duplicate=False)):
        if layer not in done:
            new = _own(name, layer)
            if new is None:
                continue
            done[layer] = new
            if isinstance(new, BinaryLayer):
                schemes[name] = layer.weight_quant.quant_injector.scheme
        result.set_submodule(name, done[layer])
    if not schemes:
        raise InvalidModel(
            f"{type(model).__name__} has no Brevitas layer whose weight_quant comes from bonn_qat.adapters.brevitas"
        )
    scheme = next(iter(schemes.values()))
    kept = [name for name, m in result.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and name not in schemes]
    result.binarization = Binarization(  # type: ignore[assignment]
        scheme=scheme,
        binary=tuple(name for name, _ in binary_layers(result)),
        kept=dict.fromkeys(kept, "not binary in Brevitas"),
        schemes={name: other for name, other in schemes.items() if other != scheme},
    )
    return result


class BonnKernelLoss(SimpleBaseLoss):  # type: ignore[misc]
    """BONN's kernel loss with the interface of Brevitas' losses: a hook adds it up in each forward pass in training.

    >>> kernel = BonnKernelLoss(model)
    >>> loss = criterion(model(images), targets) + kernel.retrieve()
    >>> loss.backward()
    >>> kernel.zero_accumulated_values()

    ``kernel.log()`` returns the value to log; ``kernel.loss`` is the module for :func:`bonn_qat.parameter_groups`.
    ``options`` are those of :class:`bonn_qat.KernelLoss`. Raises InvalidModel for a model without binary weights.
    """

    def __init__(self, model: nn.Module, reg_coeff: float = 1e-4, **options: Any) -> None:
        self.loss = KernelLoss(model, weight=1.0, **options)
        self.tot_loss: Any
        super().__init__(model, reg_coeff)

    def register_hooks(self) -> None:
        """Register the forward hook; Brevitas calls this in its constructor."""
        self.model.register_forward_hook(self._accumulate)

    def _accumulate(self, model: nn.Module, *_: object) -> None:
        if model.training and torch.is_grad_enabled():
            self.tot_loss = self.tot_loss + self.loss()


def skip_quant_tensors(model: nn.Module, skip: bool = True) -> nn.Module:
    """Make every proxy of ``model`` return plain tensors, in place; returns ``model``.

    A QuantTensor runs checks that depend on the data. Without them ``torch.compile(fullgraph=True)`` and
    ``torch.export`` accept the whole model. Not for layers with ``return_quant_tensor=True``.
    """
    for module in model.modules():
        if hasattr(module, "skip_create_quant_tensor"):
            module.skip_create_quant_tensor = skip  # type: ignore[assignment]
    return model


class _Binarized(nn.Module):
    """Applies an activation quantizer; replaces a QuantIdentity."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer.quantize(x)[0]


def _own(name: str, layer: Any) -> nn.Module | None:
    """The replacement of a Brevitas layer, None if it stays."""
    if isinstance(layer, qnn.QuantIdentity):
        _, quantizer = _quantizer(layer.act_quant)
        return _Binarized(quantizer) if isinstance(quantizer, ActivationQuantizer) else None
    theirs = tensor_quant(layer)
    if not isinstance(layer, qnn.QuantConv2d | qnn.QuantLinear) or not isinstance(theirs, WeightQuantizer):
        return None
    _, inputs = _quantizer(layer.input_quant)
    foreign = {
        "input_quant": layer.input_quant.is_quant_enabled and not isinstance(inputs, ActivationQuantizer),
        "bias_quant": layer.bias_quant.is_quant_enabled,
        "output_quant": layer.output_quant.is_quant_enabled,
    }
    for part, is_foreign in foreign.items():
        if is_foreign:
            raise InvalidModel(
                f"{name}: the {part} of this {type(layer).__name__} has no counterpart in a layer of bonn_qat"
            )
    injector = layer.weight_quant.quant_injector
    options = _options(injector)
    new = binary_form(
        _plain(layer), injector.scheme.configure(options) if options else injector.scheme, normalize=False
    )
    new.input_quant = inputs if isinstance(inputs, ActivationQuantizer) else None
    new.output = None
    for mine, other in zip(new.weight_quant.state_dict().values(), theirs.state_dict().values(), strict=True):
        mine.copy_(other.reshape(mine.shape))  # two axes in a linear layer, four here
    return new.train(layer.training)


def _plain(layer: Any) -> nn.Conv2d | nn.Linear:
    """The torch layer with the parameters of a Brevitas layer."""
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, qnn.QuantLinear):
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    else:
        plain = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, padding_mode=layer.padding_mode, device="meta",
        )  # fmt: skip
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def _complete(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Add the nonlinearity's parameters to a state dict that lacks them, such as that of a float model with ReLUs."""
    for key, own in module.state_dict().items():
        state_dict.setdefault(prefix + key, own.clone())


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.replace("-", "_").split("_"))


def _named(base: type[ExtendedInjector], name: str, scheme: Scheme) -> type[ExtendedInjector]:
    make: Any = type(base)
    injector: type[ExtendedInjector] = make(
        name, (base,), {"scheme": scheme, "__module__": __name__, "__doc__": scheme.reference}
    )
    return injector


def _quantizer(proxy: Any) -> tuple[str, nn.Module | None]:
    if getattr(proxy, "fused_activation_quant_proxy", None) is not None:
        return "fused_activation_quant_proxy.tensor_quant.", proxy.fused_activation_quant_proxy.tensor_quant
    return "tensor_quant.", getattr(proxy, "tensor_quant", None)


@torch.no_grad()
def _keep_parameters(proxy: Any, fresh: nn.Module, rederive: bool = True) -> nn.Module:
    """The proxy's current quantizer, updated to the values of ``fresh``; ``fresh`` itself if the two differ in shape.

    Brevitas creates a new quantizer in each ``load_state_dict``; an optimizer would still hold the old parameters.
    """
    _, current = _quantizer(proxy)
    if current is None:
        proxy.register_load_state_dict_pre_hook(_before_loading)
    if current is None or type(current) is not type(fresh):
        return fresh
    if not rederive:
        return current
    old, new = current.state_dict(keep_vars=True), fresh.state_dict()
    if old.keys() != new.keys() or any(_kind(old[key]) != _kind(new[key]) for key in old):
        return fresh
    for key in old:
        old[key].copy_(new[key])
    return current


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _before_loading(
    proxy: Any,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: object,
    _strict: bool,
    missing: list[str],
    *_: object,
) -> None:
    # After a deep copy the injector still refers to the original proxy and layer.
    proxy.quant_injector = proxy.quant_injector.let(proxy_module=proxy)
    proxy.update_tracked_modules()
    path, quantizer = _quantizer(proxy)
    if quantizer is None or any(prefix + path + key in state_dict for key in quantizer.state_dict()):
        return
    weight = ".".join([*prefix.split(".")[:-2], "weight"])
    if isinstance(proxy, WeightQuantProxyFromInjector) and weight not in missing:
        proxy.init_tensor_quant()
        path, quantizer = _quantizer(proxy)
    assert quantizer is not None
    state_dict.update({prefix + path + key: tensor.clone() for key, tensor in quantizer.state_dict().items()})
