# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Write a scheme
#
# A scheme says how weights and activations become binary. Here we write one: weights `scale * sign(W)`, whose scale is
# the root mean square of `W` in each filter, and inputs with the estimator of Bi-Real Net.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import bonn_qat
from bonn_qat import Recipe, Scheme, hookimpl, plugins
from bonn_qat.functional import ste_sign
from bonn_qat.quantizers import ApproxSign, WeightQuantizer

EPOCHS = 3
torch.manual_seed(0)


# %% [markdown]
# ## The quantizer
#
# `quantize` takes the latent weights `(O, I, kh, kw)` and returns value and scale. Whatever estimator it calls is the
# backward pass. A keyword-only argument becomes an option of the scheme.


# %%
class RootMeanSquare(WeightQuantizer):
    """``scale * sign(W)``; the scale is the root mean square of W in each filter, to the power ``root``."""

    def __init__(self, weight: torch.Tensor, *, root: float = 1.0) -> None:
        super().__init__()
        self.root = root

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.detach().square().mean((1, 2, 3), keepdim=True).sqrt() ** self.root
        return scale * ste_sign(x), scale


rms = Scheme(name="rms", title="RMS", reference="ours", weight=RootMeanSquare, activation=ApproxSign)

# %% [markdown]
# ## Try it
#
# `binarize` takes a scheme as it is; no package is needed.

# %%
network = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 10)
)
model = bonn_qat.binarize(network, rms, input_size=(1, 8, 8))
model.binarization

# %% [markdown]
# A quantizer keeps its contract if the values of a filter are `+scale` and `-scale` exactly, if the latent weights get
# a gradient, and if the packed network equals the model.

# %%
layer = model.get_submodule("3")
value, scale = layer.weight_quant.quantize(layer.weight)
assert torch.equal(value.abs(), scale.expand_as(value))

images, targets = torch.randn(4, 1, 8, 8), torch.arange(4)
bonn_qat.Objective(model)(images, targets).total.backward()
assert layer.weight.grad.any()

packed = bonn_qat.pack(model.eval(), (1, 8, 8))
torch.testing.assert_close(packed(images), model(images))
[(layer.name, layer.kind) for layer in packed.layers]


# %% [markdown]
# ## Compare it
#
# A comparison looks schemes up by name, through hooks. In a package, the module with the hooks is an entry point
# ([Writing a plugin](../plugins.md)); in a notebook, register an object that has them.


# %%
class Mine:
    """A plugin with one scheme."""

    @hookimpl
    def bonn_qat_schemes(self) -> list[Scheme]:
        """Offer the scheme."""
        return [rms]


pm = plugins.create_manager()
pm.register(Mine())

from bonn_qat.studies.compare import compare, plan

recipes = plan(replace(Recipe.default("digits"), epochs=EPOCHS), schemes=["bonn", "rms", "rms:root=0.5"], pm=pm)
with tempfile.TemporaryDirectory() as folder:
    comparison = compare(recipes, bonn_qat.load_data("digits"), Path(folder), pm=pm)
comparison

# %% [markdown]
# One seed each, and a few epochs: enough to see that the scheme trains, not which is better. The difference needs
# seeds: [Read a comparison](comparison_nb.py).
