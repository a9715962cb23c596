"""Train a small wide residual network on scikit-learn's digits in a plain PyTorch loop."""

import argparse

import timm
import torch

import bonn_qat  # registers wrn10_16 with timm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
generator = torch.Generator().manual_seed(arguments.seed)
digits = bonn_qat.load_data("digits")
model = timm.create_model("wrn10_16", num_classes=digits.classes, in_chans=digits.image[0])
criterion = torch.nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)

for epoch in range(arguments.epochs):
    model.train()
    for images, targets in digits.train_batches(64, generator, augment=False):
        optimizer.zero_grad()
        loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    hits = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in digits.test_batches())
print(f"accuracy: {100 * hits / digits.test_size:.2f} % of {digits.test_size} test images")
