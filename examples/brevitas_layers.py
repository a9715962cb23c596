"""Train a binary network of Brevitas layers: a different layer map, and BONN's losses.

pip install -e '.[compare]'
python examples/brevitas_layers.py
"""

# ruff: noqa: E402
import argparse
import logging
import warnings

logging.disable(logging.WARNING)  # Brevitas logs some when it is imported
warnings.filterwarnings("ignore", module="brevitas")

import timm
import torch
from brevitas.graph.quantize import layerwise_quantize

import bonn_qat  # registers wrn10_16 with timm
from bonn_qat.adapters.brevitas import float_layers, layer_map

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
generator = torch.Generator().manual_seed(arguments.seed)
digits = bonn_qat.load_data("digits")
model = timm.create_model("wrn10_16", num_classes=digits.classes, in_chans=digits.image[0])
model = layerwise_quantize(model, layer_map("bonn"), list(float_layers(model)))
objective = bonn_qat.Objective(model, regularizers={"kernel": 1e-4, "feature": 1e-3})
optimizer = torch.optim.SGD(bonn_qat.parameter_groups(objective, lr=0.1, weight_decay=5e-4), momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)

for epoch in range(arguments.epochs):
    model.train()
    for images, targets in digits.train_batches(64, generator, augment=False):
        optimizer.zero_grad()
        loss = objective(images, targets).total
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    hits = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in digits.test_batches())
print(f"accuracy: {100 * hits / digits.test_size:.2f} % of {digits.test_size} test images")
