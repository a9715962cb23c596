"""Hub: trained networks as folders that the Hugging Face Hub and timm know, and back."""

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy
from torch import nn

from bonn_qat.errors import InvalidData, within_memory
from bonn_qat.files.atomic import LARGEST, write_text
from bonn_qat.files.plain import from_json, one_line, printable, read_text
from bonn_qat.files.tensors import read_tensors, write_tensors
from bonn_qat.training.network import describe, restore

WEIGHTS, CONFIG, PACKED, CARD = "model.safetensors", "config.json", "packed.safetensors", "README.md"
ARCHITECTURE = "bonn_qat"  # what timm calls all of them
# Of timm's description of a network, what is about other weights or other images.
_OTHERS = (
    "architecture", "custom_load", "file", "hf_hub_filename", "hf_hub_id", "min_input_size", "pool_size", "source",
    "state_dict", "tag", "test_crop_pct", "test_input_size", "url",
)  # fmt: skip


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    packed: bool = True,
    card: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    pm: pluggy.PluginManager | None = None,
) -> Path:
    """Write a trained binary network into a folder for :func:`from_pretrained`, for timm, and for the Hugging Face Hub.

    The folder holds ``model.safetensors``, the file of :func:`bonn_qat.save`, whose ``card`` and ``model_options`` are
    its own; ``config.json``, which timm reads; ``packed.safetensors``, unless ``packed`` is False, for
    :class:`bonn_qat.PackedModel` and bonn-qat-runtime; and ``README.md``, a model card, unless there is one already.

    >>> bonn_qat.save_pretrained(model, "net", card={"top1": 83.2})  # doctest: +SKIP
    >>> timm.create_model("local-dir:net", pretrained=True)  # doctest: +SKIP

    Raises InvalidModel for a network that cannot be rebuilt from a file or, if ``packed``, that cannot be packed.
    Nothing is written then. Raises OSError where a file cannot be written.
    """
    directory = Path(directory)
    _write(model, directory, directory.name, packed, model_options=model_options, card=card, pm=pm)
    return directory


def from_pretrained(
    name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, **options: Any
) -> nn.Module:
    """The network of a folder that :func:`save_pretrained` wrote, or of a repository ``OWNER/NAME`` of the Hub.

    ``revision`` is a branch, a tag or a commit of the repository, and ``cache_dir`` where downloads are kept. The
    network is in evaluation mode; ``options`` are those of :func:`bonn_qat.load`. No code is run but this package's.

    >>> bonn_qat.from_pretrained("net", num_classes=5)  # doctest: +SKIP

    Raises InvalidData if there is no such folder or repository, and what :func:`bonn_qat.load` raises.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(str(name), revision=revision, cache_dir=cache_dir, allow_patterns=[WEIGHTS, CONFIG])
            )
        except (OSError, ValueError) as error:  # of huggingface_hub, for a wrong name, no network, no such repository
            raise InvalidData(
                f"{name} is no folder, and cannot be read from the Hugging Face Hub either: {one_line(error)}"
            ) from error
    elif revision is not None:
        raise InvalidData(f"{name} is a folder, which has no revisions; leave out revision={revision!r}")
    path = folder / WEIGHTS
    with within_memory(str(path)):
        tensors, header = read_tensors(path)
        if "recipe" not in header:  # timm wrote it
            header = _described(folder / CONFIG)
        return restore(tensors, header, path, **options)


def push_to_hub(
    model: nn.Module,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "A 1-bit network",
    packed: bool = True,
    card: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    pm: pluggy.PluginManager | None = None,
) -> str:
    """Upload a trained binary network to the repository ``OWNER/NAME`` of the Hub, made if need be; returns its page.

    ``packed``, ``card`` and ``model_options`` are those of :func:`save_pretrained`. A model card that is there already
    stays. Raises InvalidModel as :func:`save_pretrained` does, before anything is sent, and what huggingface_hub
    raises.

    >>> bonn_qat.push_to_hub(model, "me/resnet18-1bit", private=True)  # doctest: +SKIP
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="bonn-qat")
    with tempfile.TemporaryDirectory() as folder:
        _write(model, Path(folder), name, packed, model_options=model_options, card=card, pm=pm)
        url = api.create_repo(name, private=private, exist_ok=True)
        has_card = api.file_exists(url.repo_id, CARD, revision=revision)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, revision=revision, commit_message=message,
            ignore_patterns=[CARD] if has_card else None,
        )  # fmt: skip
    return str(url)


def timm_config(model: nn.Module, **options: Any) -> dict[str, Any]:
    """What timm's ``save_for_hf`` and ``push_to_hf_hub`` take as ``model_config`` for a binary network.

    ``options`` are ``model_options``, ``card`` and ``pm`` of :func:`bonn_qat.save`. Raises InvalidModel as it does.

    >>> timm.models.save_for_hf(model, "net", model_config=timm_config(model))  # doctest: +SKIP
    """
    return {"architecture": ARCHITECTURE, ARCHITECTURE: describe(model, **options)[1]}


def _write(model: nn.Module, directory: Path, name: str, packed: bool, **options: Any) -> None:
    from bonn_qat.packing.pack import pack

    tensors, header = describe(model, **options)
    small = pack(copy.deepcopy(model).eval()) if packed else None
    write_tensors(directory / WEIGHTS, tensors, header)
    if small is not None:
        small.save(directory / PACKED)
    if not (directory / CARD).exists():
        write_text(directory / CARD, _card(name, header, packed))
    write_text(directory / CONFIG, json.dumps(_config(model, header), indent=2) + "\n")


def _described(path: Path) -> dict[str, Any]:
    """The header that a ``config.json`` repeats; empty if it is of another program."""
    try:
        content = from_json(read_text(path, LARGEST))
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidData(f"{path} is not JSON: {error}") from error
    header = content.get(ARCHITECTURE) if isinstance(content, dict) else None
    return header if isinstance(header, dict) else {}


def _config(model: nn.Module, header: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` with what timm and readers look for; the header of the weights says the same."""
    channels, height, width = header["image"]
    own: Any = getattr(model, "pretrained_cfg", None) or {}
    data = {key: value for key, value in dict(own).items() if key not in _OTHERS and value is not None}
    data |= {"input_size": [channels, height, width], "num_classes": header["classes"]}
    if known := header.get("preprocessing") or {}:
        data |= {"mean": known["mean"], "std": known["std"], "crop_pct": known.get("crop", 1.0)}
    labels = {"label_names": known["labels"]} if known.get("labels") else {}
    return {
        "architecture": ARCHITECTURE, "library_name": "bonn-qat", "num_classes": header["classes"], **labels,
        "pretrained_cfg": data, ARCHITECTURE: dict(header),
    }  # fmt: skip


def _cell(text: str) -> str:
    return printable(" ".join(text.split())).replace("|", "\\|")


def _card(name: str, header: Mapping[str, Any], packed: bool) -> str:
    """A model card, with the front matter that the Hub reads."""
    recipe = header["recipe"]
    size = " x ".join(map(str, header["image"]))
    facts = {
        "network": f"timm's {recipe['model']}", "scheme": recipe["scheme"], "classes": header["classes"],
        "images": size, **({"data": recipe["data"]} if recipe["data"] else {}), **header.get("card", {}),
    }  # fmt: skip
    rows = [
        f"| {_cell(key)} | {_cell(value if isinstance(value, str) else json.dumps(value))} |"
        for key, value in facts.items()
    ]
    fast = [
        "", "Packed to bits, without PyTorch:", "", "```python", "from bonn_qat_runtime import Network", "",
        f'logits = Network("{PACKED}")(images)  # numpy, float32 (B, {", ".join(map(str, header["image"]))})', "```",
    ]  # fmt: skip
    lines = [
        "---", "library_name: bonn-qat", "pipeline_tag: image-classification", "tags:", "- image-classification",
        "- binary-neural-network", "- quantization", "---", "", f"# {name}", "",
        "A network with binary weights and activations, trained with bonn-qat.", "",
        "| | |", "|---|---|", *rows, "",
        "```python", "import bonn_qat", "", f'model = bonn_qat.from_pretrained("{name}")', "```",
        *(fast if packed else []),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
