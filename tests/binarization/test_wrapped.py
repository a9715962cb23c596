"""Models that cannot be copied, compute their weights, are compiled or traced by torch.fx: they work, or say why."""

import copy
import itertools
import random
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor

import bonn_qat
from bonn_qat import plugins
from bonn_qat.binarization.dry_run import tensors_in
from bonn_qat.errors import InvalidModel
from bonn_qat.layers import BinaryLayer

X = torch.randn(2, 3, 12, 12)
SIZE = (3, 12, 12)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


@dataclass
class Cache:
    """State of a model's own."""

    entries: list[Any] = field(default_factory=list)


class Keeps(nn.Module):
    """A model with a state of its own, below its root and in some container."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.net, self.inner = net(), nn.Module()
        self.inner.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


WITHIN: dict[str, Callable[[Any], Any]] = {
    "itself": lambda x: x,
    "list": lambda x: [1, x],
    "dict": lambda x: {"a": {"b": x}},
    "object": lambda x: Cache([x, x]),
    "closure's default": lambda x: types.SimpleNamespace(f=(x, "b")),
}
COPIED: dict[str, Callable[[], Any]] = {
    "an activation": lambda: net()(X),
    "a part of one": lambda: net()(X)[:, :2].detach().requires_grad_().exp(),
    "a lock": threading.Lock,
    "a lock that can be taken again": threading.RLock,
    "a condition": threading.Condition,
    "a random number generator": lambda: torch.Generator().manual_seed(3),
}
NOT_COPIED: dict[str, tuple[Callable[[], Any], str]] = {
    "a generator": (lambda: (i for i in range(9)), "generator"),
    "an open file": (lambda: open(__file__), "_io.TextIOWrapper"),  # noqa: SIM115
    "a module of Python": (lambda: random, "module"),
    "the state of a thread": (threading.local, "_thread._local"),
}


@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize(("what", "where"), list(itertools.product(COPIED, WITHIN)))
def test_state_that_copy_refuses_is_copied_where_that_is_right(what, where, size):
    state = WITHIN[where](COPIED[what]())
    model = Keeps(state)
    binary = bonn_qat.binarize(model, input_size=size)
    assert binary.binarization.binary == ("net.2", "net.3", "net.4")
    assert binary.inner.kept is not state
    assert model.inner.kept is state
    for mine, copied in zip(tensors_in(state), tensors_in(binary.inner.kept), strict=True):
        assert mine.grad_fn is not None
        assert copied.grad_fn is None
        assert torch.equal(mine, copied)
        assert mine.data_ptr() != copied.data_ptr()
    assert binary(X).isfinite().all()


@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize(("what", "where"), list(itertools.product(NOT_COPIED, WITHIN)))
def test_state_that_cannot_be_copied_is_named_and_works_in_place(what, where, size, request):
    make, word = NOT_COPIED[what]
    state = make()
    # An error may hold the model in a cycle, and an open file that is collected later would warn in another test.
    request.addfinalizer(getattr(state, "close", lambda: None))
    model = Keeps(WITHIN[where](state))
    with pytest.raises(
        InvalidModel, match=rf"Keeps cannot be copied because of inner\.kept: cannot pickle '{word}' .*inplace"
    ):
        bonn_qat.binarize(model, input_size=size)
    expected = bonn_qat.binarize(Keeps(None), input_size=size)
    assert bonn_qat.binarize(model, input_size=size, inplace=True) is model
    assert model.binarization.kept == expected.binarization.kept
    torch.testing.assert_close(model(X), expected(X))


def test_a_module_that_refuses_to_be_copied_is_told_and_works_in_place():
    class Single(Keeps):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Single":
            raise NotImplementedError("there is only one")

    for size in (None, SIZE):
        with (
            pytest.raises(InvalidModel, match=r"Single cannot be copied because of Single itself: there is only one; "),
            pytest.warns(bonn_qat.binarization.binarize.UnseenModel, match="there is only one"),
        ):
            bonn_qat.binarize(Single(None), input_size=size)
    with pytest.warns(bonn_qat.binarization.binarize.UnseenModel, match="there is only one"):
        model = bonn_qat.binarize(Single(None), input_size=SIZE, inplace=True)
    assert model.binarization.binary == ("net.2", "net.3", "net.4")


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::bonn_qat.binarization.binarize.MostlyFloat")
@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("tool", "name"),
    [
        (nn.utils.weight_norm, "WeightNorm"),
        (nn.utils.spectral_norm, "SpectralNorm"),
        (parametrizations.weight_norm, "WeightNorm"),
        (parametrizations.spectral_norm, "SpectralNorm"),
        (parametrizations.orthogonal, "Orthogonal"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "L1Unstructured"),
        (lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0), "LnStructured"),
    ],
)
def test_a_layer_whose_weight_is_computed_stays_float_with_its_reason(tool, name, called, size):
    model = net()
    for index in random.Random(name).sample([2, 3, 4], 2):
        tool(model[index])
    if called:
        model(X).sum().backward()
    binary = bonn_qat.binarize(model, input_size=size)
    computed = {n: why for n, why in binary.binarization.kept.items() if "computes" in why}
    assert len(computed) == 2
    assert all(why.endswith(f"Conv2d computes its weight by {name}") for why in computed.values())
    assert len(binary.binarization.binary) == 1
    for n in computed:
        x = torch.randn(2, 8, 4, 4)
        torch.testing.assert_close(binary.eval().get_submodule(n)(x), model.eval().get_submodule(n)(x))
    binary.train()(X).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in binary.parameters())


@pytest.mark.parametrize("how", ["whole", "called before", "in place", "a part"])
def test_a_compiled_model_is_binarized_as_the_original(how):
    model = net()
    expected = bonn_qat.binarize(model, input_size=SIZE)
    torch.compiler.reset()
    if how == "in place":
        model.compile(backend="eager")
        compiled = model
    elif how == "a part":
        compiled = nn.Sequential(torch.compile(model[:5], backend="eager"), *model[5:])
    else:
        compiled = torch.compile(model, backend="eager")
    if how == "called before":
        compiled(X)
    found = [bonn_qat.binarize(compiled, input_size=size) for size in (None, SIZE)]
    for binary in found:
        assert len(binary.binarization.binary) == 3
        assert "reads its weight" not in str(binary.binarization.kept)
        torch.testing.assert_close(binary(X), expected(X))
    assert found[0].binarization.kept == found[1].binarization.kept
    assert bonn_qat.binarize(torch.compile(model, backend="eager"), inplace=True) is model
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), expected(X))


SCHEMES = [name for name, scheme in plugins.schemes().items() if scheme.weight is not None]


def _doubled(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_binary_layers_are_leaves_of_torch_fx(scheme):
    pick = random.Random(scheme)
    options = {"linear": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)), "one": nn.Linear(8, 5)}
    model = net()
    model[-1] = options[pick.choice(list(options))]
    for one in (model, timm.create_model(pick.choice(["wrn10_16", "birealnet18"]), num_classes=5)):
        binary = bonn_qat.binarize(one, scheme, input_size=(3, 16, 16))
        layer = pick.choice([m for m in binary.modules() if isinstance(m, BinaryLayer)])
        layer.register_forward_hook(_doubled)  # it must run once
        x = torch.randn(2, 3, 16, 16)
        binary(x)
        traced = torch.fx.symbolic_trace(binary.eval())
        called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert [n for n in called if n in binary.binarization.binary] == list(binary.binarization.binary)
        assert torch.equal(traced(x), binary(x))
        again = copy.deepcopy(traced)
        assert torch.equal(again(x), binary(x))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035"])
def test_torchvisions_feature_extractor_works_on_a_binary_network(name):
    binary = bonn_qat.binarize(timm.create_model(name, num_classes=5), input_size=(3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = [binary.binarization.binary[1], binary.binarization.binary[-2]]
    seen: dict[str, Tensor] = {}
    for node in wanted:
        binary.get_submodule(node).register_forward_hook(lambda m, a, y, node=node: seen.setdefault(node, y))
    features = create_feature_extractor(binary, wanted)(x)
    seen.clear()
    binary(x)
    assert features.keys() == seen.keys() == set(wanted)
    assert all(torch.equal(features[node], seen[node]) for node in wanted)


class Fusing(nn.Module):
    """Something that is called ``fuse`` and folds nothing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.body, self.head = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        if kind == "module":
            self.fuse = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU())
        elif kind == "function":
            self.fuse = torch.add
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        return self.head(self.fuse(torch.cat([x, y], 1)) if self.kind == "module" else self.fuse(x, y))


class FusingMethod(Fusing):
    def fuse(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(("make", "kind"), [(Fusing, "module"), (Fusing, "function"), (FusingMethod, "method")])
def test_what_is_called_fuse_but_folds_nothing_stays(make, kind):
    model = bonn_qat.binarize(make(kind), input_size=(3, 8, 8))
    assert "body" in model.binarization.binary
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit
def test_a_scripted_part_stays_float():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), scripted, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    assert bonn_qat.binarize(model, input_size=(3, 8, 8)).binarization.binary == ("2",)


@dataclass(slots=True)
class Slots:
    low: Tensor
    high: Tensor


@pytest.mark.parametrize("wrap", [Slots, lambda *x: dict(enumerate(x)).values(), lambda *x: {*x}, lambda *x: [x]])
def test_outputs_in_any_container_are_found(wrap):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.middle, self.low, self.high = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))

        def forward(self, x: Tensor) -> Any:
            low = self.low(self.middle(self.stem(x)))
            return wrap(low, self.high(low))

    assert bonn_qat.binarize(Two(), input_size=(3, 8, 8)).binarization.binary == ("middle",)
