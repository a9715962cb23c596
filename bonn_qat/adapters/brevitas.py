"""Schemes for Brevitas' layers: quantizers to name in ``weight_quant=``, ``act_quant=`` and ``input_quant=``.

>>> import brevitas.nn as qnn
>>> sign = qnn.QuantIdentity(act_quant=SignedBinaryBonnActPerTensorConst)
>>> conv = qnn.QuantConv2d(16, 32, 3, bias=False, weight_quant=SignedBinaryBonnWeightPerTensorFloat)

The tensor quantizers are the modules of :mod:`bonn_qat.quantizers`, so the losses see them too. Options of a
scheme's weight quantizer are keywords of the layer: ``QuantConv2d(..., weight_granularity="plane")``.
Norms, nonlinearities and the scale of the latent weights are the user's: after a ReLU every sign is +1.

The state dict is complete from construction on, and loading one keeps every Parameter object, so optimizers
stay valid. A float layer's state dict loads strictly: the quantizer's parameters follow from its weights.
Brevitas' models cannot be pickled, for their quantizers are nested classes: keep the state dict.
"""

from typing import Any

import brevitas.config
import brevitas.nn as qnn
import torch
from brevitas.inject import ExtendedInjector, value
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor, nn

from bonn_qat.bonn import BONN
from bonn_qat.errors import BonnQatError, InvalidModel
from bonn_qat.plugins import find_scheme
from bonn_qat.scheme import Scheme

__all__ = [
    "SignedBinaryBonnActPerTensorConst",
    "SignedBinaryBonnWeightPerTensorFloat",
    "activation_quantizer",
    "layer_map",
    "skip_quant_tensors",
    "weight_quantizer",
]

# Brevitas finds export handlers by the exact type of the proxy, so all that is ours is in the tensor quantizer.


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
                f"{type(layers[0]).__name__} has its kernels on axis 1; a binary layer has them on axis 0"
            )
        injector = proxy_module.quant_injector
        options = {name: getattr(injector, name) for name in injector.__dependencies__ if name not in _WIRING}
        assert scheme.weight is not None
        fresh = scheme.weight(tracked_parameter_list[0].detach(), **options)
        if not fresh.scaled_sign:
            raise InvalidModel(
                f"the weights of the scheme {scheme.name!r} are not a scale times a sign, as 1 bit is for Brevitas; "
                "use bonn_qat.binarize"
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
            raise BonnQatError("BREVITAS_JIT=1 cannot script the quantizers of bonn_qat; unset it")
        assert scheme.activation is not None
        layers = list(module) if isinstance(module, tuple) else [module]
        # A QuantIdentity does not know its channels.
        channels = getattr(layers[0], "in_channels", getattr(layers[0], "in_features", 1))
        fresh = scheme.activation(channels)
        if fresh.bits != 1:
            raise InvalidModel(
                f"the activations of the scheme {scheme.name!r} have {fresh.bits} bits, this adapter knows 1; "
                "use bonn_qat.binarize"
            )
        is_owner = all(a is b for a, b in zip(layers, proxy_module.tracked_module_list, strict=True))
        return _keep_parameters(proxy_module, fresh, rederive=False) if is_owner else fresh


_WIRING = {*_Weight.__dependencies__, "module", "proxy_module", "tracked_parameter_list"}


class SignedBinaryBonnWeightPerTensorFloat(_Weight):
    """BONN's weights, ``mean(w) * sign(X)`` with a learned modulation w: :class:`bonn_qat.quantizers.BonnWeight`.

    >>> conv = QuantConv2d(16, 32, 3, weight_quant=SignedBinaryBonnWeightPerTensorFloat, weight_granularity="plane")
    """


class SignedBinaryBonnActPerTensorConst(_Activation):
    """BONN's activations, ``sign`` with the clipped straight-through gradient: :class:`bonn_qat.quantizers.SteSign`.

    >>> sign = QuantIdentity(act_quant=SignedBinaryBonnActPerTensorConst)
    """


def weight_quantizer(scheme: str | Scheme) -> type[ExtendedInjector]:
    """What ``weight_quant=`` takes, for any scheme. Raises UnknownName, and InvalidModel where the scheme has none."""
    chosen = find_scheme(scheme)
    if chosen.weight is None:
        raise InvalidModel(f"the scheme {chosen.name!r} leaves weights float; there is no weight_quant for it")
    return _named(_Weight, f"SignedBinary{_camel(chosen.name)}Weight", chosen)


def activation_quantizer(scheme: str | Scheme) -> type[ExtendedInjector]:
    """What ``act_quant=`` and ``input_quant=`` take. Raises UnknownName, and InvalidModel where the scheme has none."""
    chosen = find_scheme(scheme)
    if chosen.activation is None:
        raise InvalidModel(f"the scheme {chosen.name!r} leaves activations float; there is no act_quant for it")
    return _named(_Activation, f"SignedBinary{_camel(chosen.name)}Act", chosen)


def layer_map(scheme: str | Scheme) -> dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]]:
    """The ``compute_layer_map`` of ``brevitas.graph.quantize.layerwise_quantize``, for ``nn.Conv2d``.

    >>> blacklist = list(bonn_qat.policy.float_layers(model))
    >>> model = layerwise_quantize(model, compute_layer_map=layer_map("bonn"), name_blacklist=blacklist)

    Brevitas matches exact classes: subclasses of ``nn.Conv2d``, such as timm's ``Conv2dSame``, stay float.
    Raises UnknownName, and InvalidModel for a scheme that leaves weights float.
    """
    chosen = find_scheme(scheme)
    arguments = {
        "weight_quant": weight_quantizer(chosen),
        "input_quant": None if chosen.activation is None else activation_quantizer(chosen),
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    return {nn.Conv2d: (qnn.QuantConv2d, arguments)}


def skip_quant_tensors(model: nn.Module, skip: bool = True) -> nn.Module:
    """Let every proxy of ``model`` pass plain tensors, in place; returns ``model``.

    What a QuantTensor checks depends on data: without it ``torch.compile(fullgraph=True)`` and ``torch.export``
    take the whole model. Not for layers with ``return_quant_tensor=True``.
    """
    for module in model.modules():
        if hasattr(module, "skip_create_quant_tensor"):
            module.skip_create_quant_tensor = skip  # type: ignore[assignment]
    return model


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
    """The proxy's quantizer with the values of ``fresh``, or ``fresh`` if it has none that fits.

    Brevitas makes a new quantizer at each ``load_state_dict``; an optimizer would keep the old one's parameters.
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
    # A deep copy's injector still holds the original's proxy and layer.
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
