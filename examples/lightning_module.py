"""Train a binary network with Lightning: the Objective is a submodule of the LightningModule.

pip install -e '.[compare,lightning]'
python examples/lightning_module.py
"""

import argparse
import logging
import warnings
from typing import Any

import lightning
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bonn_qat  # registers wrn10_16 with timm

Batch = tuple[Tensor, Tensor]


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """A model, its loss and its optimizer."""

    def __init__(self, model: nn.Module, epochs: int) -> None:
        super().__init__()
        self.model, self.epochs = model, epochs
        self.objective = bonn_qat.Objective(model)
        self.hits = self.images = 0

    def training_step(self, batch: Batch, index: int) -> Tensor:
        images, targets = batch
        loss: Tensor = self.objective(images, targets).total
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        if self.trainer.is_last_batch:
            print(f"epoch {self.current_epoch + 1}: loss {outputs['loss'].item():.3f}")

    def test_step(self, batch: Batch, index: int) -> None:
        images, targets = batch
        self.hits += int((self.model(images).argmax(1) == targets).sum())
        self.images += len(targets)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(bonn_qat.parameter_groups(self.objective, lr=0.1, weight_decay=5e-4), momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")  # it suggests more data loading workers
lightning.seed_everything(arguments.seed, verbose=False)
digits = bonn_qat.load_data("digits")
train_set, test_set = (
    TensorDataset(*map(torch.cat, zip(*batches, strict=True)))
    for batches in (digits.measure_batches(), digits.test_batches())
)
model = timm.create_model("wrn10_16", num_classes=digits.classes, in_chans=digits.image[0])
classifier = Classifier(bonn_qat.binarize(model), arguments.epochs)
trainer = lightning.Trainer(
    max_epochs=arguments.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(classifier, DataLoader(train_set, 64, shuffle=True))
trainer.test(classifier, DataLoader(test_set, 500), verbose=False)
print(f"accuracy: {100 * classifier.hits / classifier.images:.2f} % of {classifier.images} test images")
