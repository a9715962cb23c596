"""``python -m bonn_qat``: the command ``bonn-qat``, as ``torchrun -m`` and ``accelerate launch -m`` want it."""

import sys

from bonn_qat.cli import main

if __name__ == "__main__":
    sys.exit(main())
