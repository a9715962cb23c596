# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Binarize and train in ten minutes
#
# A small residual network learns scikit-learn's digits, first as floats and then with binary weights and activations.
# It needs the extra `compare` and a minute of CPU time.

# %%
import timm
import torch

import bonn_qat  # registers wrn10_16 with timm

torch.manual_seed(0)
EPOCHS = 8
digits = bonn_qat.load_data("digits")
print(digits.train_size, "training and", digits.test_size, "test images of", digits.image)

# %% [markdown]
# ## A float network and its binary form
#
# `binarize` returns a copy. Convolutions become binary; the first layer, the classifier and the shortcuts stay float,
# and `binarization` says why.

# %%
float_model = timm.create_model("wrn10_16", num_classes=digits.classes, in_chans=digits.image[0])
model = bonn_qat.binarize(float_model)
model.binarization

# %% [markdown]
# The summary counts what the network has once it is packed: a bit for each binary weight, and how many products are of
# bits.

# %%
bonn_qat.summary(model)


# %% [markdown]
# ## Train
#
# `Objective` is cross entropy with the losses of the model's scheme, and has parameters of its own. For the float
# network it is cross entropy alone.


# %%
def train(model: torch.nn.Module) -> list[float]:
    """Train ``model``, and return the loss of each epoch."""
    objective = bonn_qat.Objective(model)
    optimizer = torch.optim.SGD(bonn_qat.parameter_groups(objective, lr=0.1, weight_decay=5e-4), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(EPOCHS):
        model.train()
        total = 0.0
        for images, targets in digits.train_batches(64, generator, augment=False):
            optimizer.zero_grad()
            loss = objective(images, targets).total
            loss.backward()
            optimizer.step()
            total += loss.item() * len(images)
        schedule.step()
        losses.append(total / digits.train_size)
    return losses


flips = bonn_qat.FlipRatio(model)
curves = {"float": train(float_model), "BONN": train(model)}
flips.update()
for name, trained in (("float", float_model), ("BONN", model)):
    print(f"{name}: {bonn_qat.evaluate(trained.eval(), digits).top1:.2f} % of the test images")

# %% [markdown]
# One run with one seed on 1,438 images: the difference is no result, and another seed gives another one.
# [Read a comparison](comparison_nb.py) says how to find out.

# %%
import matplotlib.pyplot as plt

for name, losses in curves.items():
    plt.plot(range(1, EPOCHS + 1), losses, label=name)
plt.xlabel("epoch")
plt.ylabel("training loss")
_ = plt.legend()

# %% [markdown]
# ## What the signs do
#
# Behind each binary weight is a float, the latent weight. The network computes with its sign, times the layer's scale.

# %%
name, layer = list(bonn_qat.binary_layers(model))[-1]
value, scale = layer.weight_quant.quantize(layer.weight)
print(f"{name}: {layer.weight.numel():,} latent weights, the scale is {scale.mean():.4f}")
plt.hist(layer.weight.detach().flatten(), bins=60)
_ = plt.xlabel("latent weight")

# %% [markdown]
# The share of the weights that ended with another sign than they began with, by layer:

# %%
{name: f"{100 * share:.1f} %" for name, share in flips.compute().items()}

# %% [markdown]
# `diagnose` measures the share of +1 among the inputs of each binary layer. Near 0 or 1 a layer would see the same
# whatever the image.

# %%
images, _ = next(digits.test_batches(100))
{name: f"{share:.2f}" for name, share in bonn_qat.diagnose(model, images).shares.items()}
