"""Models of transformers: binarized, trained a step by its Trainer, packed and exported."""

import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

import bonn_qat
from bonn_qat.exporting.export import verify

pytest.importorskip("transformers")
with warnings.catch_warnings():  # torchao, which they import
    warnings.simplefilter("ignore")
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        ViTConfig,
        ViTForImageClassification,
    )  # fmt: skip

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1, "num_labels": 3}
IDS = torch.randint(1, 50, (4, 8), generator=torch.Generator().manual_seed(0))


class Constrain(TrainerCallback):
    """After each step latent weights are put back into their range."""

    def on_step_end(self, args, state, control, model, **_) -> None:
        bonn_qat.constrain_(model)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """Trained for a step."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, max_position_embeddings=8, **SMALL)
    mask = torch.ones_like(IDS)
    model = bonn_qat.binarize(
        BertForSequenceClassification(config), example_inputs={"input_ids": IDS, "attention_mask": mask}
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    objective = bonn_qat.Objective(model, lambda output, targets: cross_entropy(output.logits, targets))
    arguments = TrainingArguments(
        str(tmp_path_factory.mktemp("trainer")), max_steps=1, per_device_train_batch_size=4, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(bonn_qat.parameter_groups(objective, lr=1e-2, weight_decay=0.01))
    trainer = Trainer(
        objective, arguments, train_dataset=[{"images": ids, "targets": int(ids[0]) % 3} for ids in IDS],
        optimizers=(optimizer, None), callbacks=[Constrain()],
    )  # fmt: skip
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {f"{name}.weight" for name in model.binarization.binary} <= moved
    return model.eval().requires_grad_(False)


def test_a_bert_keeps_its_tables_and_its_classifier_alone(bert) -> None:
    kept = {name.rpartition(".")[2] for name in bert.binarization.kept}
    assert kept == {"word_embeddings", "position_embeddings", "token_type_embeddings", "classifier"}


def test_a_bert_is_packed_and_exported_with_its_mask(bert, tmp_path) -> None:
    packed = bonn_qat.pack(bert)
    assert [each.name for each in packed.inputs] == ["input_ids", "attention_mask"]
    assert {layer.kind for layer in packed.layers} == {"bits"}
    given = {"input_ids": IDS[:2], "attention_mask": (torch.arange(8) < torch.tensor([[8], [5]])).long()}
    torch.testing.assert_close(packed(**given)["logits"], bert(**given).logits)
    assert verify(bert, bonn_qat.export(bert, tmp_path / "a.pt2", "pt2"), "pt2").difference < 1e-5


def test_a_vit_is_packed_and_runs_in_c() -> None:
    pytest.importorskip("bonn_qat_runtime")
    config = ViTConfig(image_size=16, patch_size=8, **SMALL)
    model = bonn_qat.binarize(ViTForImageClassification(config), input_size=(3, 16, 16)).eval()
    packed, images = bonn_qat.pack(model), torch.randn(2, 3, 16, 16)
    assert packed.runtime == "C"
    with torch.no_grad():
        torch.testing.assert_close(packed(images)["logits"], model(images).logits)
