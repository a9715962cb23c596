# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Pack, measure, deploy
#
# From a trained network to bits: how large it is, whether it is equal, how fast it is, and what it becomes in C. It
# needs `plugins/bonn-qat-weights`, `plugins/bonn-qat-runtime` and the extra `bench`.

# %%
import tempfile
from pathlib import Path

import timm
import torch

import bonn_qat

ROUNDS = 8
model = bonn_qat.create_model("wrn22_16.bonn_cifar10", pretrained=True).eval()
size = (3, 32, 32)
bonn_qat.summary(model, size)

# %% [markdown]
# ## Pack
#
# `pack` traces the network for one size of image. The file needs neither the model's class nor timm.

# %%
folder = Path(tempfile.mkdtemp())
packed = bonn_qat.pack(model, size)
packed.save(folder / "net.safetensors")
print(f"{(folder / 'net.safetensors').stat().st_size / 1000:.0f} kB on disk, runs in {packed.runtime}")

# %% [markdown]
# What became of each layer:

# %%
from collections import Counter

Counter(layer.kind for layer in packed.layers)

# %% [markdown]
# ## Is it equal?
#
# Sums of signs are whole numbers. Float layers add in another order, so the last digits of a logit may differ.

# %%
images = torch.randn(16, *size)
with torch.no_grad():
    expected, got = model(images), packed(images)
print("largest difference of a logit:", float((expected - got).abs().max()))
print("same class:", bool((expected.argmax(1) == got.argmax(1)).all()))

# %% [markdown]
# ## How fast is it?
#
# `bench` lets the forms of a network take turns. The times here are those of the machine that built this page, which
# did other work at the same time; `bonn-qat bench NAME` measures yours.

# %%
from bonn_qat.bench import bench

report = bench(timm.create_model("wrn22_16", num_classes=10), model, size, batches=[1], threads=[1], rounds=ROUNDS)
report

# %% [markdown]
# ## Without PyTorch
#
# The same file, with numpy alone:

# %%
import numpy as np
from bonn_qat_runtime import Network

net = Network(folder / "net.safetensors")
print(net)
print(net(np.zeros((1, *size), np.float32)).round(2))

# %% [markdown]
# ## As C
#
# `export` writes a folder that any C compiler builds; `bonn-qat export --format wasm` does the same for browsers. See
# [Deployment](../deployment.md).

# %%
bonn_qat.export(model, folder / "net", "c", input_size=size)
print(*sorted(path.name for path in (folder / "net").iterdir()), sep="\n")
