"""Write docs/loops.md: what to change in a training loop for BONN, as differences of the scripts in ``examples``.

python docs/loops.py
"""

import ast
import difflib
from pathlib import Path

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"

INTRODUCTION = """\
# BONN in a loop that is there already

Each pair of scripts is `examples/before/NAME.py` and `examples/NAME.py`, two whole trainings on scikit-learn's digits
that a test runs; the differences below are theirs, made by `python docs/loops.py`. For the loops without quantization
the script before is a float training, for Brevitas, torchao and torch.ao it is one with the host's own 8 bits.
"""

LOOPS = {
    "plain": (
        "Plain torch",
        "The two losses are modules with parameters, so the optimizer gets them too. `bonn_qat.Objective` is both and "
        "the task's loss in one. Nothing is out of reach here: `feature.start(batches)` measures the classes where the "
        "feature loss comes in later, and `bonn_qat.constrain_` and `advance` serve the schemes that need them.",
    ),
    "timm_task": (
        "timm's tasks, as in its train.py",
        "The task adds the regularizers of the model's scheme; its result holds each term, and `state_dict` in a "
        "checkpoint stays the model's. timm has no plugins, so its `train.py` needs these lines edited in. "
        "`bonn_qat.parameter_groups(task.objective, ...)` gives the modulation its slower rate, which the optimizer "
        "factory does not know of. The feature loss needs classes: with Mixup or CutMix pass "
        '`regularizers={"kernel": 1e-4}`. Needs timm 1.0.23.',
    ),
    "brevitas_layers": (
        "Brevitas",
        "Brevitas replaces layers one by one: no norm comes before a sign, latent weights keep their scale, subclasses "
        "of `nn.Conv2d` stay float, and schemes whose weights are no scale times a sign do not fit. ReLUs go: "
        "after them every sign is +1. `from_brevitas(model)` turns the result into layers of this package, "
        "`BonnKernelLoss` is the kernel loss in the manner of Brevitas' own.",
    ),
    "torchao_quantize": (
        "torchao",
        "With `whole_model` the network is that of `bonn_qat.binarize`, with another `filter_fn` the layers it picks. "
        "torchao knows layers and not losses, so these are added as everywhere. Converted weights are int8 signs and a "
        "scale; there is no binary kernel in torchao, the products stay float. `config_from_dict` of torchao reads its "
        "own configs only.",
    ),
    "torch_ao_qconfig": (
        "torch.ao",
        "torch.ao.quantization is deprecated and no place for new code. `assign_qconfig` marks the layers of "
        "`bonn_qat.binarize`, `prepare_qat` takes those of torch.ao as well. `convert` has no binary kernel and leaves "
        "binary layers as they are. The prepared model does not know its scheme, so the regularizers are named.",
    ),
    "accelerate_loop": (
        "Accelerate",
        "The Objective goes through `prepare` in the model's place: among several processes its parameters are "
        "synchronised with the model's. `model` stays the network that is evaluated and saved.",
    ),
    "lightning_module": (
        "Lightning",
        "The Objective is a part of the module, so every strategy of Lightning moves and synchronises it. A checkpoint "
        "names the network twice, as `model` and as `objective.model`; the tensors are the same.",
    ),
}


def code(path: Path) -> list[str]:
    """The lines of a script after its docstring."""
    text = path.read_text(encoding="utf-8")
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def difference(name: str) -> list[str]:
    """What changes from ``examples/before/NAME.py`` to ``examples/NAME.py``, in unified form."""
    before, after = f"before/{name}.py", f"{name}.py"
    return list(difflib.unified_diff(code(EXAMPLES / before), code(EXAMPLES / after), before, after, lineterm="", n=1))


def added(name: str) -> int:
    """How many lines the script with BONN has that the one before lacks."""
    return sum(line.startswith("+") for line in difference(name)[2:])


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, (title, text) in LOOPS.items():
        shown = "\n".join(difference(name))
        parts.append(f"## {title}\n\n{text}\n\n```diff\n{shown}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "loops.md").write_text(page(), encoding="utf-8")
