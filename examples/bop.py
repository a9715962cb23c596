"""Train a binary network without latent weights: Bop flips the binary weights, Adam trains all other parameters.

    pip install -e '.[compare]' -e plugins/bonn-qat-baselines
    python examples/bop.py --epochs 25

On scikit-learn's digits, 25 epochs take about 20 seconds on one CPU core and reach 96 to 99 %.
"""

import argparse
import math

import timm
import torch

import bonn_qat  # registers wrn10_16 with timm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=25)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
generator = torch.Generator().manual_seed(arguments.seed)
digits = bonn_qat.load_data("digits")
model = timm.create_model("wrn10_16", num_classes=digits.classes, in_chans=digits.image[0])
model = bonn_qat.binarize(model, "bnn")  # weights are plain signs, so the layer computes with what Bop stores

binary, others = bonn_qat.binary_parameters(model)
bop = bonn_qat.Bop(binary, threshold=1e-6, gamma=1e-3)  # the paper uses 1e-8 and 1e-4, for longer training
adam = torch.optim.Adam(others, lr=0.01)
flips = bonn_qat.FlipRatio(model)

for epoch in range(arguments.epochs):
    # Cosine schedule for both optimizers; Bop has gamma in place of a learning rate.
    remaining = 0.5 + 0.5 * math.cos(math.pi * epoch / arguments.epochs)
    bop.param_groups[0]["gamma"], adam.param_groups[0]["lr"] = 1e-3 * remaining, 0.01 * remaining
    model.train()
    flips.reset()
    for images, targets in digits.train_batches(64, generator, augment=True):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        bop.step()
        adam.step()
        flips.update()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {flips.compute()['']:.2e} of the weights flipped per step")

model.eval()
with torch.no_grad():
    hits = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in digits.test_batches())
print(f"accuracy: {100 * hits / digits.test_size:.2f} % of {digits.test_size} test images")
