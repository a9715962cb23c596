"""``python -m bonn_qat`` is the command ``bonn-qat``, so that ``torchrun -m bonn_qat`` works too."""

import sys

from bonn_qat.cli import main

if __name__ == "__main__":
    sys.exit(main())
