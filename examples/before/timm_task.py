"""Train a timm backbone on scikit-learn's digits with timm's task, optimizer, schedule and evaluator."""

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask

import bonn_qat

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
generator = torch.Generator().manual_seed(arguments.seed)
digits = bonn_qat.load_data("digits")
model = timm.create_model("test_resnet", num_classes=digits.classes, in_chans=digits.image[0])
task = ClassificationTask(model, torch.nn.CrossEntropyLoss())
optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = CosineLRScheduler(optimizer, t_initial=arguments.epochs)

for epoch in range(arguments.epochs):
    task.train()
    for images, targets in digits.train_batches(64, generator, augment=False):
        result = task(images, targets)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    schedule.step(epoch + 1)
    print(
        f"epoch {epoch + 1}: "
        + ", ".join(f"{key} {value.item():.3f}" for key, value in result.items() if "loss" in key)
    )

task.eval()
evaluator = task.create_evaluator()
with torch.no_grad():
    for images, targets in digits.test_batches():
        evaluator.update(model(images), targets)
print(f"accuracy: {evaluator.summary()['top1']:.2f} % of {digits.test_size} test images")
