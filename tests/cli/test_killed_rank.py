"""A process of a group that is killed: the others end with one line, and the last checkpoint is whole."""

import random
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from bonn_qat import cli
from bonn_qat.studies.comparison import read_comparison
from bonn_qat.training.checkpoint import read_state

# The victim is killed in one of its steps, at the beginning of a backward pass, or while it waits for a test.
SCRIPT = """
import os, signal, sys
from bonn_qat.cli import main
from bonn_qat.training.trainer import Trainer
rank, victim, when, step, port, output = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
steps, whole = 0, getattr(Trainer, when)
def killed(self, *arguments):
    global steps
    steps += 1
    if rank == victim and steps == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *arguments)
setattr(Trainer, when, killed)
sizes = ["--train-images", "16", "--test-images", "8", "--epochs", "3", "-b", "8"]
sys.exit(main(["train", *sizes, "--output", output]))
"""


def _port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize(("victim", "when", "steps"), [(0, "step", 6), (1, "_test", 3)])
def test_the_other_process_ends_with_one_line_and_the_run_goes_on_from_its_checkpoint(
    victim: int, when: str, steps: int, tmp_path: Path, run_scripts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script, output, port = tmp_path / "rank.py", tmp_path / "out", _port()
    script.write_text(SCRIPT)
    step = str(random.Random(f"{victim}{when}").randint(2, steps))
    commands = [[str(script), str(rank), str(victim), when, step, port, str(output)] for rank in (0, 1)]
    ended = run_scripts(*commands, cwd=tmp_path)
    assert ended[victim].returncode == -signal.SIGKILL
    other = ended[1 - victim]
    assert other.returncode == 1, other.stderr
    (line,) = [line for line in other.stderr.splitlines() if line.startswith("bonn-qat: ")]
    assert line.startswith("bonn-qat: another process of the group ended, or cannot be reached; finished runs are kept")
    assert "Traceback" not in other.stderr
    (checkpoint,) = output.rglob("*.unfinished.safetensors")
    assert len(read_state(checkpoint).progress.epochs) < 3
    assert cli.main(["train", "--resume", str(output)]) == 0
    assert not read_comparison(output).missing
