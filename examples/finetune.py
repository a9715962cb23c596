"""Train a pretrained 1-bit network further on other data, and the same network from its random start for comparison.

The network knows CIFAR-10 (colour, 32x32); the new data are scikit-learn's digits (grey, 8x8), enlarged. Run it with
``python examples/finetune.py --epochs 3``. It needs ``bonn-qat-weights`` and scikit-learn.
"""

import argparse

import torch

import bonn_qat
from bonn_qat.training.data import TensorData


def enlarged_digits(train_images: int) -> TensorData:
    """The digits as images ``(1, 32, 32)``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * 255 / 16
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear").round().to(torch.uint8)
    targets = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:train_images], order[-360:]
    return TensorData(
        "digits32", (images[train], targets[train]), (images[test], targets[test]), classes=10, pad=4, flip=False
    )


def main() -> None:
    """Print the accuracy of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="wrn22_16.bonn_cifar10", help="one of bonn_qat.list_models(pretrained=True)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train-images", type=int, default=1400)
    args = parser.parse_args()
    data = enlarged_digits(args.train_images)
    for pretrained in (True, False):
        model = bonn_qat.create_model(args.name, pretrained, num_classes=data.classes, in_chans=1)
        recipe = bonn_qat.Recipe(data="digits32", epochs=args.epochs, batch_size=64, lr=0.05)
        result = bonn_qat.train(model, recipe, data)
        print(f"{'pretrained' if pretrained else 'from scratch'}: {result.top1:.2f} % after {args.epochs} epochs")


if __name__ == "__main__":
    main()
