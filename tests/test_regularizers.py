"""The loss modules: what they measure, move and refuse; their formulas are tested in ``test_functional.py``."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bonn_qat import CenterLoss, FeatureLoss, KernelLoss, binarize, distributed, functional
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidData, InvalidModel, InvalidRecipe
from bonn_qat.layers import BinaryConv2d
from bonn_qat.quantizers import WeightQuantizer

PLAIN = dataclasses.replace(BONN, norm=None, nonlinearity=None, latent_std=None)
DOUBLE = torch.float64


class PerFilter(WeightQuantizer):
    """A scheme without a learned modulation."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.detach().abs().mean((1, 2, 3), keepdim=True)
        return scale * functional.ste_sign(x), scale


def convolutional(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 5, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    return net.to(dtype)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4))


def batches(sizes: list[int], classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 2, 2, generator=generator), torch.randint(classes, (n,), generator=generator)) for n in sizes
    ]


def relative_error(value: Tensor, reference: np.ndarray) -> float:
    deviation = np.abs(value.detach().double().numpy() - reference).max()
    return float(deviation / np.abs(reference).max())


# ------------------------------------------------------------------------------------------ the kernel loss


def test_mu_and_sigma_start_at_the_statistics_of_their_kernels():
    model = binarize(convolutional())
    kernel = KernelLoss(model)
    latents = [layer.weight.detach().double().flatten(1).numpy() for layer in (model[1], model[2])]
    assert relative_error(kernel.mu, np.concatenate([np.abs(x).mean(1) for x in latents])) < 1e-6
    assert relative_error(kernel.sigma, np.concatenate([x.std(1, ddof=1) for x in latents])) < 1e-6
    assert kernel.mu.shape == (4 + 5,)


def test_sigma_can_start_at_the_spread_of_the_magnitudes():
    model = binarize(convolutional())
    kernel, other = KernelLoss(model, spread="magnitudes"), KernelLoss(model)
    latents = [layer.weight.detach().double().flatten(1).numpy() for layer in (model[1], model[2])]
    assert relative_error(kernel.sigma, np.concatenate([np.abs(x).std(1, ddof=1) for x in latents])) < 1e-6
    assert torch.equal(kernel.mu, other.mu)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nu": -1e-4}, "nu of the kernel loss must be a number of at least 0; got -0.0001"),
        ({"nu": "1e-3"}, "nu of the kernel loss must be a number of at least 0; got '1e-3'"),
        ({"min_sigma": 0}, "min_sigma of the kernel loss must be a number of at least 1e-15; got 0"),
        ({"min_sigma": True}, "min_sigma of the kernel loss must be a number of at least 1e-15; got True"),
        ({"spread": "all"}, "spread of the kernel loss must be 'weights' or 'magnitudes'; got 'all'"),
        ({"per_element": "no"}, "per_element of the kernel loss must be true or false; got 'no'"),
    ],
)
def test_an_impossible_option_of_the_kernel_loss_is_told(options, words):
    with pytest.raises(InvalidRecipe, match=words):
        KernelLoss(binarize(convolutional()), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": float("nan")}, "alpha of the feature loss must be a number of at least 0; got nan"),
        ({"min_sigma": 0.0}, r"min_sigma of the feature loss must be a number of at least 1e-15; got 0\.0"),
        ({"spread": "weights"}, "spread of the feature loss must be 'class' or 'all'; got 'weights'"),
        ({"reduction": "none"}, "reduction of the feature loss must be 'mean' or 'sum'; got 'none'"),
    ],
)
def test_an_impossible_option_of_the_feature_loss_is_told(options, words):
    with pytest.raises(InvalidRecipe, match=words):
        FeatureLoss(dense(), **options)


def test_without_the_division_mu_and_sigma_get_their_number_of_elements_times_the_gradient():
    model = binarize(convolutional(DOUBLE))
    gradients = {}
    for per_element in (True, False):
        kernel = KernelLoss(model, per_element=per_element)
        with torch.no_grad():
            kernel.mu.mul_(1.1)
        gradients[per_element] = torch.autograd.grad(kernel(), [kernel.mu, kernel.sigma, model[1].weight])
    elements = torch.tensor([3 * 9] * 4 + [4 * 9] * 5)
    for printed, derivative in zip(gradients[True][:2], gradients[False][:2], strict=True):
        torch.testing.assert_close(derivative, elements * printed)
    assert torch.equal(gradients[True][2], gradients[False][2])


def test_sigma_is_raised_to_its_minimum_at_the_start_and_before_each_use():
    model = binarize(convolutional())
    kernel = KernelLoss(model, min_sigma=0.5)
    assert kernel.sigma.tolist() == [0.5] * 9
    with torch.no_grad():
        kernel.sigma.copy_(torch.linspace(-1, 1, 9))
    assert kernel().isfinite()
    assert kernel.sigma.tolist() == torch.linspace(-1, 1, 9).clamp(min=0.5).tolist()


def test_the_loss_is_its_weight_times_the_sum_over_layers():
    model = binarize(convolutional())
    kernel = KernelLoss(model, weight=0.2, nu=0.1)
    mu, sigma = kernel.mu.split([4, 5]), kernel.sigma.split([4, 5])
    expected = sum(
        functional.kernel_loss(layer.weight, layer.weight_quant.modulation, m, s, nu=0.1)
        for layer, m, s in zip((model[1], model[2]), mu, sigma, strict=True)
    )
    torch.testing.assert_close(kernel(), 0.2 * expected)


def test_a_quantizer_without_modulation_lends_its_scale():
    model = binarize(convolutional(), dataclasses.replace(PLAIN, weight=lambda weight: PerFilter()))
    kernel = KernelLoss(model, weight=1.0, nu=0.1)
    mu, sigma = kernel.mu.split([4, 5]), kernel.sigma.split([4, 5])
    expected = 0.0
    for layer, m, s in zip((model[1], model[2]), mu, sigma, strict=True):
        _, scale = layer.weight_quant.quantize(layer.weight)
        expected += functional.kernel_loss(layer.weight, scale, m, s, nu=0.1, scale=scale)
    torch.testing.assert_close(kernel(), expected)
    kernel().backward()
    assert model[1].weight.grad.any()


def test_weight_zero_switches_the_loss_off():
    model = binarize(convolutional())
    loss = KernelLoss(model, weight=0.0)()
    loss.backward()
    assert loss.item() == 0
    assert not model[1].weight.grad.any()


@pytest.mark.parametrize("weight", [-1e-4, float("nan"), float("inf")])
def test_an_impossible_weight_is_refused(weight):
    with pytest.raises(ValueError, match="weight of a regularizer"):
        KernelLoss(binarize(convolutional()), weight=weight)


def test_the_loss_owns_mu_and_sigma_and_nothing_of_the_model():
    kernel = KernelLoss(binarize(convolutional()))
    assert set(dict(kernel.named_parameters())) == set(kernel.state_dict()) == {"mu", "sigma"}
    assert set(kernel.parameter_rules) == {"mu", "sigma"}
    assert not any(rule.decay for rule in kernel.parameter_rules.values())


def test_a_model_without_binary_weights_is_refused():
    with pytest.raises(InvalidModel, match="no binary weights in Sequential"):
        KernelLoss(convolutional())


def test_the_loss_follows_the_device_and_dtype_of_the_latents():
    model = binarize(convolutional(DOUBLE))
    kernel = KernelLoss(model)
    assert kernel.mu.dtype == kernel().dtype == DOUBLE


def test_no_gradient_for_mu_and_sigma_at_the_statistics_of_the_latents():
    model = binarize(convolutional(DOUBLE), PLAIN)
    kernel = KernelLoss(model, weight=1.0, nu=1.0)
    magnitudes = [layer.weight.detach().abs().flatten(1) for layer in (model[1], model[2])]
    with torch.no_grad():
        kernel.mu.copy_(torch.cat([x.mean(1) for x in magnitudes]))
        kernel.sigma.copy_(torch.cat([x.var(1, correction=0).sqrt() for x in magnitudes]))
    kernel().backward()
    assert kernel.mu.grad.abs().max() < 1e-12
    assert kernel.sigma.grad.abs().max() < 1e-12


# --------------------------------------------------------------------- task loss and kernel loss through a net


@pytest.mark.parametrize("reading", ["algorithm1", "inverse"])
@pytest.mark.parametrize("granularity", ["kernel", "plane", "filter"])
def test_latents_and_modulation_get_equations_11_to_16_of_task_and_kernel_loss(granularity, reading):
    lam, nu = 0.05, 0.4
    torch.manual_seed(2)
    scheme = PLAIN.configure({"granularity": granularity, "reading": reading})
    model = binarize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, padding=1, stride=2)).double(), scheme, include=["1"]
    )
    layer = model[1]
    assert isinstance(layer, BinaryConv2d)
    is_inverse = reading == "inverse"
    with torch.no_grad():
        layer.weight.mul_(8)
        w = torch.rand(layer.weight_quant.modulation.shape) * 2 - 0.3
        layer.weight_quant.modulation.copy_(w.abs() + 0.2 if is_inverse else w)
    kernel = KernelLoss(model, weight=lam, nu=nu)
    images, targets = torch.randn(6, 3, 9, 9, dtype=DOUBLE), torch.tensor([0, 1, 2, 3, 4, 0])

    def task(maps: Tensor) -> Tensor:
        return F.cross_entropy(maps.mean((2, 3)), targets)

    (task(model(images)) + kernel()).backward()

    x, w = layer.weight.detach(), layer.weight_quant.modulation.detach()
    signs = torch.where(x >= 0, 1.0, -1.0).double()
    scale = (1 / w if is_inverse else w).mean((1, 2, 3), keepdim=True)
    binarized = (scale * signs).requires_grad_()  # what convolves
    inputs = torch.where(model[0](images) >= 0, 1.0, -1.0).double()
    maps = F.conv2d(inputs, binarized, layer.bias, stride=2, padding=1)
    (grad,) = torch.autograd.grad(task(maps), binarized)

    X, W, S = (t.numpy() for t in (x, w, signs))
    Q = S if is_inverse else binarized.detach().numpy()  # X^
    G = (grad * scale if is_inverse else grad).numpy()  # dL_S / dX^
    own = (0,) if granularity == "kernel" else (0, 1) if granularity == "plane" else (1, 2, 3)  # what shares a w
    mu, sigma = (p.detach().numpy()[:, None, None, None] for p in (kernel.mu, kernel.sigma))
    inside = np.abs(W * X) <= 1
    assert 0 < inside.sum() < inside.size
    plus, minus = X >= 0, X < 0
    equation_12 = G * inside * W
    equation_13 = lam * (W * (W * X - Q) + nu * (plus * (X - mu) + minus * (X + mu)) / sigma**2)
    equation_15 = (G * inside * X).sum(own, keepdims=True)
    if is_inverse:  # the scale is a function of w, too
        every = (1, 2, 3) if granularity == "filter" else (0, 1, 2, 3)
        equation_15 -= (grad.numpy() * S).sum(every, keepdims=True) / W[0].size / W**2
    equation_16 = lam * ((W * X - Q) * X).sum(own, keepdims=True)
    assert relative_error(layer.weight.grad, equation_12 + equation_13) < 1e-6  # (11)
    assert relative_error(layer.weight_quant.modulation.grad, equation_15 + equation_16) < 1e-6  # (14)


# ----------------------------------------------------------------------------------------- the feature loss


def test_the_feature_loss_is_taken_at_the_input_of_the_classifier():
    model = dense().eval()
    feature = FeatureLoss(model, weight=0.3).eval()
    with torch.no_grad():
        feature.centres.copy_(torch.randn(4, 5))
        feature.sigma.copy_(torch.rand(4, 5) + 0.5)
    ((images, targets),) = batches([7])
    features = model[:-1](images)
    model(images)
    expected = functional.feature_loss(features, targets, feature.centres, feature.sigma)
    torch.testing.assert_close(feature(targets), 0.3 * expected)


def test_a_summed_feature_loss_is_that_of_the_whole_batch_also_where_processes_average_their_gradients(monkeypatch):
    model = dense().eval()
    ((images, targets),) = batches([6])

    def gradient(part: slice, reduction: str) -> Tensor:
        feature = FeatureLoss(model, reduction=reduction).eval()
        model(images[part])
        return torch.autograd.grad(feature(targets[part]), model[1].weight)[0]

    whole = gradient(slice(6), "sum")
    torch.testing.assert_close(whole, 6 * gradient(slice(6), "mean"))
    monkeypatch.setattr(distributed, "world", lambda: 2)
    halves = [gradient(part, "sum") for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(whole, sum(halves) / 2)


@pytest.mark.parametrize("loss", [FeatureLoss, CenterLoss])
@pytest.mark.parametrize("alpha", [0.5, 0.1])
def test_centres_move_by_the_center_loss_rule_in_training_only(loss, alpha):
    model = dense().eval()
    term = loss(model, alpha=alpha)
    start = torch.randn(4, 5)
    term.centres.copy_(start)
    ((images, targets),) = batches([8])
    features = model[:-1](images).detach().double().numpy()

    term.eval()
    model(images)
    term(targets)
    assert torch.equal(term.centres, start)

    term.train()
    model(images)
    value = term(targets)
    expected = start.double().numpy()
    for m in range(4):
        own = features[targets.numpy() == m]
        expected[m] -= alpha * (expected[m] - own).sum(0) / (1 + len(own))
    assert relative_error(term.centres, expected) < 1e-6
    assert torch.equal(term.centres[3], start[3])  # a class that the batch lacks stays

    value.backward()  # with the centres as they were before they moved
    reference = loss(model, alpha=alpha).eval()
    reference.centres.copy_(start)
    gradient = model[1].weight.grad.clone()
    model.zero_grad()
    model(images)
    reference(targets).backward()
    torch.testing.assert_close(gradient, model[1].weight.grad)


FEATURES = {
    "equal": lambda n: torch.full((n, 5), 0.3),
    "zero": lambda n: torch.zeros(n, 5),
    "one that differs": lambda n: torch.cat([torch.zeros(n - 1, 5), torch.ones(1, 5)]),
    "subnormal": lambda n: torch.full((n, 5), 1e-40),
    "far": lambda n: torch.linspace(-1e15, 1e15, 5 * n).reshape(n, 5),
    "normal": lambda n: torch.randn(n, 5, generator=torch.Generator().manual_seed(n)),
}
TARGETS = {
    "one image": [1],
    "one class": [2] * 6,
    "one image of each class": [0, 1, 2, 3],
    "two absent": [0, 0, 3, 3, 0],
}


@pytest.mark.parametrize("spread", ["class", "all", None], ids=["class", "all", "center loss"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("features", FEATURES)
def test_classes_without_images_or_spread_have_a_finite_loss(spread, targets, features):
    """Started, without a start, and over five steps that follow the gradient."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 4))
    labels = torch.tensor(TARGETS[targets])
    images = FEATURES[features](len(labels)).requires_grad_()
    loss, options = (FeatureLoss, {"spread": spread, "min_sigma": 1e-15}) if spread else (CenterLoss, {})
    for started in (True, False):
        term = loss(model, weight=1.0, **options)
        if started:
            term.start([(images.detach(), labels)])
        assert term.centres.isfinite().all()
        for _ in range(5):
            term.zero_grad()
            images.grad = None
            model(images)
            value = term(labels)
            if features == "far" and started is False and loss is FeatureLoss:
                break  # a square beyond float32 in a batch that no start has seen
            value.backward()
            assert value.isfinite()
            for name, tensor in [("features", images), *term.named_parameters()]:
                assert tensor.grad.isfinite().all(), name
            with torch.no_grad():
                for parameter in term.parameters():
                    parameter -= 1e-3 * parameter.grad.clamp(-1, 1)
        assert term.centres.isfinite().all()


def test_kernels_of_one_element_have_the_least_spread():
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    model = binarize(net, include=["1"], input_size=(3, 4, 4))
    kernel = KernelLoss(model, min_sigma=0.02)
    assert torch.equal(kernel.sigma, torch.full((4,), 0.02))
    torch.testing.assert_close(kernel.mu, model[1].weight.abs().flatten())


DENSE = {
    "pixels": (lambda: nn.Conv2d(5, 4, 1), (2, 5, 3, 4), (2, 3, 4)),
    "finer targets": (lambda: nn.Conv2d(5, 4, 1), (2, 5, 3, 4), (2, 7, 16)),
    "coarser targets": (lambda: nn.Conv2d(5, 4, 1), (2, 5, 4, 6), (2, 3, 3)),
    "signals": (lambda: nn.Conv1d(5, 4, 3), (3, 5, 7), (3, 7)),
    "tokens": (lambda: nn.Linear(5, 4), (3, 7, 5), (3, 7)),
}


@pytest.mark.parametrize("kind", DENSE)
def test_with_a_target_for_each_pixel_every_pixel_is_a_sample(kind):
    make, shape, size = DENSE[kind]
    model = nn.Sequential(nn.Identity(), make()).double()
    feature, center = (
        each(model, weight=2.0, classifier="1", ignore_index=9).double() for each in (FeatureLoss, CenterLoss)
    )
    targets = torch.tensor([0, 1, 2, 9, -100])[torch.randint(5, size)]
    x = torch.randn(shape, dtype=DOUBLE).requires_grad_()
    axis = -1 if kind == "tokens" else 1
    places = torch.Size([n for i, n in enumerate(shape) if i and i != axis % len(shape)])
    labels = F.interpolate(targets[:, None].double(), places, mode="nearest-exact")[:, 0].reshape(-1).long()
    vectors = x.movedim(axis, -1).reshape(-1, 5)
    known = [(f, int(m)) for f, m in zip(vectors, labels, strict=True) if m in (0, 1, 2)]

    feature.start([(x.detach(), targets)])
    for m in (0, 1, 2):
        own = torch.stack([f for f, other in known if other == m]).detach()
        torch.testing.assert_close(feature.centres[m], own.mean(0))
        torch.testing.assert_close(feature.sigma[m].detach(), own.std(0, correction=0))
    center.centres.copy_(feature.centres.normal_())

    sigma = feature.sigma.detach().clone().requires_grad_()
    squares = [(f - feature.centres[m]).square() for f, m in known]
    terms = [(d + d / sigma[m] ** 2 + (sigma[m] ** 2).log()).sum() for d, (_, m) in zip(squares, known, strict=True)]
    for loss, expected in (
        (feature, 2.0 * torch.stack(terms).sum() / (2 * len(known))),
        (center, 2.0 * torch.stack(squares).sum() / (2 * len(known))),
    ):
        before = loss.centres.clone()
        model(x)
        found = loss(targets)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, x, retain_graph=True), torch.autograd.grad(expected, x, retain_graph=True)
        )
        torch.testing.assert_close(loss.centres, moved(before, [(f.detach(), m) for f, m in known]))
    model(x)
    (found,) = torch.autograd.grad(feature.eval()(targets), feature.sigma)
    assert found.isfinite().all()


def moved(centres: Tensor, samples: list[tuple[Tensor, int]]) -> Tensor:
    """The centres after one step of the center loss, at a rate of 1/2."""
    result = centres.clone()
    for m in range(len(centres)):
        own = [f for f, other in samples if other == m]
        if own:
            result[m] -= 0.5 * sum(centres[m] - f for f in own) / (1 + len(own))
    return result


def test_calls_at_two_resolutions_are_pixels_of_both_and_one_pixel_is_an_image():
    class Pyramid(nn.Sequential):
        def forward(self, *maps: Tensor) -> list[Tensor]:
            return [super(Pyramid, self).forward(x) for x in maps]

    model = Pyramid(nn.Conv2d(5, 4, 1)).double()
    loss = FeatureLoss(model, classifier="0").double().eval()
    x, targets = torch.randn(2, 5, 4, 4, dtype=DOUBLE), torch.randint(4, (2, 4, 4))

    def of(*maps: Tensor, labels: Tensor = targets) -> Tensor:
        model(*maps)
        return loss(labels)

    coarse = F.avg_pool2d(x, 2)
    torch.testing.assert_close(of(x, coarse), (16 * of(x) + 4 * of(coarse)) / 20)
    pixel = x[:, :, :1, :1]
    torch.testing.assert_close(of(pixel, labels=targets[:, :1, :1]), of(pixel, labels=targets[:, 0, 0]))
    with pytest.raises(InvalidModel, match=r"which takes a target for each, such as \(B, H, W\); got int64 \(2,\)"):
        of(x, labels=targets[:, 0, 0])
    with pytest.raises(InvalidRecipe, match="ignore_index of the feature loss must be a whole number; got '9'"):
        FeatureLoss(model, classifier="0", ignore_index="9")


def test_center_loss_is_half_the_mean_squared_distance():
    model = dense().eval()
    center = CenterLoss(model, weight=1.0).eval()
    center.centres.copy_(torch.randn(4, 5))
    ((images, targets),) = batches([6])
    features = model[:-1](images).detach().double().numpy()
    model(images)
    distances = ((features - center.centres.double().numpy()[targets]) ** 2).sum(1)
    assert center(targets).item() == pytest.approx(distances.mean() / 2, rel=1e-6)
    assert list(center.parameters()) == []


def test_start_measures_means_and_spreads_of_the_classes():
    model = dense()
    model[2].eval()  # a norm that a user froze
    flags = [module.training for module in model.modules()]
    feature = FeatureLoss(model, min_sigma=0.05)
    data = batches([6, 9, 1, 12])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    feature.start(data)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    model.eval()
    features = np.concatenate([model[:-1](images).detach().double().numpy() for images, _ in data])
    of_all = FeatureLoss(model, min_sigma=0.05, spread="all")
    of_all.start(data)
    assert torch.equal(of_all.centres, feature.centres)
    assert relative_error(of_all.sigma, np.tile(features.std(0).clip(0.05), (4, 1))) < 1e-6
    labels = np.concatenate([targets.numpy() for _, targets in data])
    means = np.stack([features[labels == m].mean(0) for m in range(3)] + [np.zeros(5)])
    spreads = np.stack([features[labels == m].std(0).clip(0.05) for m in range(3)] + [np.ones(5)])
    assert relative_error(feature.centres, means) < 1e-6
    assert relative_error(feature.sigma, spreads) < 1e-6


def test_a_class_with_one_image_keeps_the_default_spread():
    feature = FeatureLoss(dense())
    images, _ = batches([3])[0]
    feature.start([(images, torch.tensor([0, 0, 1]))])
    assert feature.sigma[1].tolist() == [1.0] * 5
    assert feature.centres[1].any()


def test_sigma_of_the_classes_is_raised_to_its_minimum_before_use():
    model = dense().eval()
    feature = FeatureLoss(model, min_sigma=0.2)
    with torch.no_grad():
        feature.sigma.copy_(torch.full((4, 5), -1.0))
    ((images, targets),) = batches([3])
    model(images)
    assert feature(targets).isfinite()
    assert (feature.sigma == 0.2).all()


def test_a_classifier_can_be_named_and_its_classes_counted_anew():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.Flatten())
    feature = FeatureLoss(model, classifier="2", num_classes=9)
    assert feature.centres.shape == feature.sigma.shape == (9, 6)
    model(torch.randn(2, 3, 4, 4))
    assert feature(torch.tensor([8, 0])).isfinite()


@pytest.mark.parametrize("loss", [FeatureLoss, CenterLoss])
def test_a_model_without_a_classifier_is_refused(loss):
    with pytest.raises(InvalidModel, match="classifier"):
        loss(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(InvalidModel, match="is a ReLU"):
        loss(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), classifier="1")


def test_labels_out_of_range_are_named():
    labels = [0, 4]
    model = dense().eval()
    feature = FeatureLoss(model)
    model(batches([2])[0][0])
    with pytest.raises(InvalidData, match=r"labels run from 0 to 4, the model has 4 classes"):
        feature(torch.tensor(labels))
    with pytest.raises(InvalidData, match="labels run from"):
        feature.start([(batches([2])[0][0], torch.tensor(labels))])


def test_each_forward_pass_serves_one_call():
    model = dense().eval()
    feature = FeatureLoss(model)
    ((images, targets),) = batches([3])
    with pytest.raises(InvalidModel, match="after each forward pass"):
        feature(targets)
    model(images)
    feature(targets)
    with pytest.raises(InvalidModel, match="after each forward pass"):
        feature(targets)


def test_targets_are_needed():
    model = dense().eval()
    feature = FeatureLoss(model)
    model(batches([3])[0][0])
    with pytest.raises(InvalidData, match=r"feature\(targets\)"):
        feature()
    model(batches([3])[0][0])
    with pytest.raises(InvalidData, match=r"needs class indices \(3,\), .*; got float32 \(3, 4\); with Mixup's"):
        feature(torch.full((3, 4), 0.25))


def test_a_model_with_a_tap_can_be_copied_after_a_forward_pass():
    model = dense()
    feature = FeatureLoss(model)
    ((images, targets),) = batches([4])
    model(images)
    twin = copy.deepcopy(model)
    twin(2 * images)  # goes to the twin's own tap, not to the loss of the original
    assert feature(targets).isfinite()
    assert set(dict(feature.named_parameters())) == {"sigma"}
    assert set(feature.state_dict()) == {"sigma", "centres"}


class Views(nn.Module):
    """A shared classifier that is called once for each part of the images that ``parts`` returns."""

    def __init__(self, parts) -> None:
        super().__init__()
        self.body, self.head, self.parts = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), nn.Linear(5, 4), parts

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(self.body(part)) for part in self.parts(x)]


WAYS = {
    "plain": lambda model, images: model(images),
    "compiled": lambda model, images: torch.compile(model, backend="eager", fullgraph=True)(images),
    "checkpointed": lambda model, images: sum(
        y.sum() for y in checkpoint(model, images.requires_grad_(), use_reentrant=False)
    ).backward(),
    "after an evaluation": lambda model, images: (model(-images), model.head(torch.zeros(7, 5)), model(images)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("kind", [FeatureLoss, CenterLoss])
def test_every_call_of_the_classifier_counts_with_the_same_targets(kind, calls, way):
    model = Views(lambda x: [x * (i + 1) for i in range(calls)])
    loss = kind(model, classifier="head", weight=1.0)
    single = Views(lambda x: [x])
    single.load_state_dict(model.state_dict())
    expected = kind(single, classifier="head", weight=1.0)
    for seed in range(2):
        ((images, targets),) = batches([3 + seed])
        WAYS[way](model, images.clone())
        single(torch.cat([images * (i + 1) for i in range(calls)]))
        torch.testing.assert_close(loss(targets), expected(targets.repeat(calls)))
        torch.testing.assert_close(loss.centres, expected.centres)
    every = batches([3, 5])
    loss.start(every)
    expected.start([(torch.cat([x * (i + 1) for i in range(calls)]), t.repeat(calls)) for x, t in every])
    torch.testing.assert_close(loss.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("parts", "targets"),
    [
        (lambda x: x.chunk(2), torch.zeros(4).long()),  # nothing says which half has which targets
        (lambda x: x.chunk(2), torch.zeros(2, 1).long()),
        (lambda x: x[:2].chunk(2), torch.zeros(()).long()),
        (lambda x: [x, x[:1]], torch.zeros(4).long()),
        (lambda x: [x, x], torch.zeros(8).long()),
        (lambda x: [x, x], [0, 1, 2, 3]),
    ],
)
def test_calls_without_one_row_for_each_target_are_refused(parts, targets):
    model = Views(parts)
    loss = FeatureLoss(model, classifier="head")
    model(batches([4])[0][0])
    with pytest.raises((InvalidModel, InvalidData), match=r"is called 2 times in a forward pass, with|needs class ind"):
        loss(targets)
