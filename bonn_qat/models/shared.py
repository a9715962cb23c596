"""The architecture of folders and repositories that ``bonn_qat.save_pretrained`` wrote, for ``timm.create_model``."""

from typing import Any

from timm.models import register_model
from torch import nn

from bonn_qat.errors import InvalidModel


@register_model  # type: ignore[untyped-decorator]
def bonn_qat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A binary network of ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``, which say what it is; in training mode."""
    from bonn_qat.training.hub import from_pretrained

    config = kwargs.pop("pretrained_cfg", None)
    source = config if isinstance(config, dict) else {}
    name, _, revision = str(source.get("hf_hub_id", "")).partition("@")
    if not (place := source.get("file") or name):
        raise InvalidModel(
            "the architecture 'bonn_qat' is that of folders and repositories; name one: local-dir:FOLDER or "
            "hf-hub:OWNER/NAME"
        )
    options = {key: kwargs.pop(key, None) for key in ("num_classes", "in_chans", "cache_dir")}
    kwargs.pop("pretrained_cfg_overlay", None)
    return from_pretrained(
        place, revision=revision or None, trained=pretrained, model_options=kwargs, **options
    ).train()
