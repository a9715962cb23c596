"""Train a small wide residual network on scikit-learn's digits with Hugging Face Accelerate."""

import argparse

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import bonn_qat  # registers wrn10_16 with timm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

set_seed(arguments.seed)
accelerator = Accelerator()
digits = bonn_qat.load_data("digits")
train_set, test_set = (
    TensorDataset(*map(torch.cat, zip(*batches, strict=True)))
    for batches in (digits.measure_batches(), digits.test_batches())
)
model = timm.create_model("wrn10_16", num_classes=digits.classes, in_chans=digits.image[0])
criterion = torch.nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
train_loader, test_loader = accelerator.prepare(DataLoader(train_set, 64, shuffle=True), DataLoader(test_set, 500))
model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

for epoch in range(arguments.epochs):
    model.train()
    for images, targets in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(images), targets)
        accelerator.backward(loss)
        optimizer.step()
    schedule.step()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
hits = 0
with torch.no_grad():
    for images, targets in test_loader:
        guesses, targets = accelerator.gather_for_metrics((model(images).argmax(1), targets))
        hits += int((guesses == targets).sum())
accelerator.print(f"accuracy: {100 * hits / digits.test_size:.2f} % of {digits.test_size} test images")
