"""A lean model keeps less for its backward pass, and its gradients are those of the same model, bit for bit."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import bonn_qat
from bonn_qat.bonn import BONN
from bonn_qat.engine import operators
from bonn_qat.engine.kept import lean
from bonn_qat.layers import BinaryLayer, binary_form
from bonn_qat.scheme import PReLU

needs_kernels = pytest.mark.skipif(not operators.AVAILABLE, reason="no kernels")
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "wrn": (lambda: timm.create_model("wrn10_16"), 16),
    "birealnet": (lambda: timm.create_model("birealnet18", num_classes=10, stem="cifar"), 8),
    "resnet": (
        lambda: timm.create_model(
            "resnet18", num_classes=10, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8
        ),
        32,
    ),
    "vit": (lambda: timm.create_model("test_vit", num_classes=10, img_size=32, patch_size=8, depth=2), 32),
    "efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=10), 32),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), 32),
    "convnext": (lambda: timm.create_model("test_convnext", num_classes=10), 32),
}


@pytest.fixture(autouse=True)
def no_hooks_are_left() -> Iterator[None]:
    yield
    assert _top_saved_tensors_default_hooks(True) is None


def made(net: str, scheme: str = "bonn") -> tuple[nn.Module, Tensor]:
    make, size = NETS[net]
    model = bonn_qat.binarize(make(), scheme, input_size=(3, size, size)).train()
    return model, torch.randn(4, 3, size, size)


def not_lean(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model._forward_pre_hooks.clear()
    model._forward_hooks.clear()
    return model


def gradients(model: nn.Module, x: Tensor, call: Callable[..., Tensor] = lambda model, x: model(x)) -> list[Tensor]:
    torch.manual_seed(0)
    y = call(model, x)
    y.sin().sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), *found, *(buffer.clone() for buffer in model.buffers())]


def check_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scheme", ["bonn", "reactnet", "adabin", "dorefa", "bnn"])
@pytest.mark.parametrize("net", NETS)
def test_gradients_are_equal(net: str, scheme: str) -> None:
    model, x = made(net, scheme)
    plain = not_lean(model)
    check_equal(gradients(model, x), gradients(plain, x))


@needs_kernels
@pytest.mark.parametrize("scheme", ["bonn", "reactnet"])
@pytest.mark.parametrize("net", ["wrn", "resnet", "vit", "efficientnet", "convnext"])
def test_no_output_of_a_binary_layer_outlives_the_forward_pass(net: str, scheme: str) -> None:
    model, x = made(net, scheme)

    def alive(model: nn.Module) -> int:
        seen: list[weakref.ref[Any]] = []
        forward = BinaryLayer._by_engine

        def step(layer: BinaryLayer, x: Tensor, norm: nn.Module | None, addend: Tensor | None, *geometry: Any) -> Any:
            found = forward(layer, x, norm, addend, *geometry)
            assert found is not None
            if addend is None or not found[1]:  # a sum with a shortcut is kept, as the input of what follows
                seen.append(weakref.ref(found[0].untyped_storage()))
            return found

        for layer in model.modules():
            if isinstance(layer, BinaryLayer):
                layer._by_engine = step.__get__(layer)  # type: ignore[method-assign]
        logits = model(x)
        gc.collect()
        count = sum(reference() is not None for reference in seen)
        assert logits.requires_grad
        return count

    assert kept_bytes(model, x) < kept_bytes(not_lean(model), x)
    assert alive(model) == 0


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What the graph of a forward pass keeps, parameters and input aside."""
    y = model(x)
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def add(value: Any) -> None:
        tensor = value if isinstance(value, Tensor) else getattr(value, "tensor", None)
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()

    nodes, seen = [y.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved"):
                raw = getattr(node, name)
                for saved in raw if isinstance(raw, tuple | list) else (raw,):
                    add(getattr(saved, "data", None))
    return sum(size for address, size in found.items() if address not in own)


class Net(nn.Module):
    """A binary layer, and ``after`` on its output, which keeps it."""

    def __init__(self, after: Callable[..., Any], middle: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = binary_form(nn.Conv2d(16, 16, 3, padding=1), BONN)
        self.middle = nn.Identity() if middle is None else middle
        self.w = nn.Parameter(torch.randn(16, 1, 1))
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.middle(self.conv(x)))


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity, "norm": lambda: nn.BatchNorm2d(16), "prelu": lambda: PReLU(16), "gelu": nn.GELU,
    "tanh gelu": lambda: nn.GELU(approximate="tanh"), "silu": nn.SiLU, "hardswish": nn.Hardswish,
    "frozen norm": lambda: nn.BatchNorm2d(16).eval(), "norm without bias": lambda: nn.BatchNorm2d(16, bias=False),
    "chain": lambda: nn.Sequential(nn.BatchNorm2d(16), nn.GELU(), nn.BatchNorm2d(16), PReLU(16)),
}  # fmt: skip
AFTERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "product": lambda net, y: y * net.w,
    "view": lambda net, y: y.flatten(2).mT * net.w.flatten(),
    "part": lambda net, y: y[:, 2:9, ::2] * net.w[2:9],
    "permuted": lambda net, y: y.permute(0, 2, 3, 1) * net.w.flatten(),
    "twice": lambda net, y: y * net.w + (y * y).sin(),
    "changed in place": lambda net, y: y.mul_(2) * net.w,
    "changed through a view": lambda net, y: (y[:, :2].zero_(), y * net.w)[1],
    "detached": lambda net, y: y * net.w + y.detach() * net.w,
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("after", AFTERS)
@pytest.mark.parametrize("middle", MIDDLES)
def test_what_is_computed_again_is_what_was(middle: str, after: str, layout: torch.memory_format) -> None:
    net = Net(AFTERS[after], MIDDLES[middle]())
    x = torch.randn(2, 16, 5, 7).to(memory_format=layout)
    plain = copy.deepcopy(net)
    lean(net)
    check_equal(gradients(net, x), gradients(plain, x))


class Tokens(nn.Module):
    """A norm over tokens, whose channels are the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.w = nn.BatchNorm1d(6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT * self.w


def test_a_norm_of_a_transposed_map_is_kept_as_it_is() -> None:
    model, x = Tokens(), torch.randn(4, 5, 6)
    plain = copy.deepcopy(model)
    lean(model)
    check_equal(gradients(model, x), gradients(plain, x))


@pytest.mark.parametrize("middle", ["none", "norm"])
def test_a_bias_may_change_after_the_forward_pass(middle: str) -> None:
    net = Net(AFTERS["product"], MIDDLES[middle]())

    def call(net: Any, x: Tensor) -> Tensor:
        y = net(x)
        with torch.no_grad():
            net.conv.bias.add_(1)
            getattr(net.middle, "bias", net.conv.bias).add_(1)
        return y  # type: ignore[no-any-return]

    plain, x = copy.deepcopy(net), torch.randn(2, 16, 5, 7)
    lean(net)
    check_equal(gradients(net, x, call), gradients(plain, x, call))


@pytest.mark.parametrize("middle", MIDDLES)
def test_an_output_that_changes_without_autograd_gives_an_error_or_the_right_gradient(middle: str) -> None:
    net = Net(lambda net, y: (y, y * net.w), MIDDLES[middle]())
    x = torch.randn(2, 16, 5, 7)
    expected = gradients(copy.deepcopy(net), x, lambda net, x: net(x)[1])
    lean(net)

    def call(net: nn.Module, x: Tensor) -> Tensor:
        y, product = net(x)
        with torch.no_grad():
            y.add_(1)
        return product  # type: ignore[no-any-return]

    # The output of a norm of constant statistics is kept itself, and that of a layer only where there are no kernels.
    if middle in ("frozen norm", "norm without bias") or (middle == "none" and not operators.AVAILABLE):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(net, x, call)
    else:
        check_equal(gradients(net, x, call), expected)


def test_two_losses_have_a_backward_pass_each() -> None:
    net = Net(lambda net, y: (y.sin().sum(), (y.detach() * net.w).sum()))
    plain, x = copy.deepcopy(net), torch.randn(2, 16, 5, 7)
    lean(net)
    for model in (net, plain):
        for loss in model(x):
            loss.backward()
    check_equal([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_a_graph_may_be_kept_for_a_second_backward_pass() -> None:
    model, x = made("wrn")
    loss = model(x).sin().sum()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    check_equal(list(first), list(torch.autograd.grad(loss, parameters)))


# ------------------------------------------------------------------------------------------------- hooks of others


def test_hooks_of_others_see_everything() -> None:
    model, x = made("wrn")
    counts = []
    for each in (model, not_lean(model)):
        seen: list[int] = []
        with saved_tensors_hooks(lambda t, seen=seen: (seen.append(t.numel()), t)[1], lambda t: t):
            each(x)
        counts.append(seen)
    assert counts[0]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("place", ["around", "inside"])
def test_hooks_of_others_change_no_gradient(place: str) -> None:
    model, x = made("wrn")
    plain = not_lean(model)
    if place == "inside":
        inner = model.layer2.forward  # type: ignore[union-attr, operator]

        def forward(x: Tensor) -> Tensor:
            with save_on_cpu():
                return inner(x)  # type: ignore[no-any-return, operator]

        model.layer2.forward = forward  # type: ignore[union-attr, assignment]
        check_equal(gradients(model, x), gradients(plain, x))
        return

    def call(model: nn.Module, x: Tensor) -> Tensor:
        with save_on_cpu():
            return model(x)  # type: ignore[no-any-return]

    check_equal(gradients(model, x, call), gradients(plain, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_model_keeps_its_input_alone(reentrant: bool) -> None:
    model, x = made("wrn")
    for norm in model.modules():  # a checkpoint updates statistics twice
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    expected = gradients(not_lean(model), x)
    found = gradients(model, x, lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant))
    check_equal(found, expected)


def test_checkpointed_blocks_have_equal_gradients() -> None:
    for net in ("wrn", "vit", "resnet"):
        model, x = made(net)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        expected = gradients(not_lean(model), x)
        model.set_grad_checkpointing(True)  # type: ignore[operator]
        check_equal(gradients(model, x), expected)


def test_where_hooks_are_forbidden_there_are_none() -> None:
    model, x = made("wrn")
    with disable_saved_tensors_hooks("none here"):
        model(x).sum().backward()


# --------------------------------------------------------------------------------------------- calls of every kind


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_leaves_no_hooks(error: type[BaseException]) -> None:
    model, x = made("wrn")
    expected = gradients(not_lean(model), x)
    handle = model.layer2.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))  # type: ignore[union-attr]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises((error, RuntimeError)):
        model(x)
    handle.remove()
    model.load_state_dict(state)
    check_equal(gradients(model, x)[:1], expected[:1])


def test_an_exception_before_the_call_is_the_only_thing_told() -> None:
    model, x = made("wrn")
    outer = nn.Sequential(model)
    lean(outer)

    def fail(module: nn.Module, inputs: Any) -> None:
        raise ValueError("mine")

    model.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(ValueError, match="mine"):
        outer(x)


def test_models_in_models_and_parts_of_models() -> None:
    model, x = made("wrn")
    plain = not_lean(model)
    outer = nn.Sequential(model)
    lean(outer)
    expected = gradients(plain, x)
    state = copy.deepcopy(model.state_dict())
    check_equal(gradients(outer, x), expected)
    model.load_state_dict(state)
    parts = gradients(model, x, lambda model, x: model.forward_head(model.forward_features(x)))
    assert len(parts) == len(expected)


def test_copies_are_lean() -> None:
    model, x = made("wrn")
    expected = gradients(not_lean(model), x)
    size = kept_bytes(copy.deepcopy(model), x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept_bytes(copy.deepcopy(again), x) == size
        check_equal(gradients(again, x), expected)


def test_threads_train_for_themselves() -> None:
    models = [made("wrn") for _ in range(2)]
    expected = [gradients(not_lean(model), x) for model, x in models]
    found: dict[int, list[Tensor]] = {}

    def train(index: int) -> None:
        model, x = models[index]
        y = model(x)
        y.sin().sum().backward()
        found[index] = [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]

    threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        check_equal(found[index], expected[index])


def test_without_gradients_nothing_is_hooked() -> None:
    model, x = made("wrn")
    model.register_forward_hook(lambda *_: None)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert _top_saved_tensors_default_hooks(True) is None
            assert not model(x).requires_grad


@pytest.mark.parametrize("net", ["wrn", "vit"])
def test_it_compiles_without_a_break(net: str) -> None:
    model, x = made(net)
    plain = not_lean(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = gradients(compiled, x), gradients(plain, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
