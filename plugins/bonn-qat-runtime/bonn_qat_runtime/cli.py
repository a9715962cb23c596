"""The command ``bonn-qat-run FILE IMAGE...``: what a packed network sees in image files."""

import argparse
import sys
from collections.abc import Sequence

from bonn_qat_runtime.errors import RuntimeFailure
from bonn_qat_runtime.images import predict
from bonn_qat_runtime.network import Network


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the classes of each image with their probabilities; 1 if something cannot be read or run, else 0."""
    parser = argparse.ArgumentParser(
        prog="bonn-qat-run", description="Run a packed network of bonn-qat on image files, without torch."
    )
    parser.add_argument("file", help="what bonn_qat.pack(model).save(FILE) wrote")
    parser.add_argument("images", nargs="+", metavar="image", help="an image file, such as PNG or JPEG")
    parser.add_argument("--top", type=int, default=5, help="how many classes of each image are shown (default 5)")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error("--top is at least 1")
    try:
        network = Network(options.file)
        for path, guesses in zip(options.images, predict(network, options.images, top=options.top), strict=True):
            shown = ", ".join(f"{guess.label} {100 * guess.probability:.1f}%" for guess in guesses)
            sys.stdout.write(f"{path}: {shown}\n")
    except RuntimeFailure as error:
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
        sys.stderr.write(f"bonn-qat-run: {text}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
