"""Classify texts with a BERT of two layers, float and binary: from which package of Python are 32 words of code?

pip install -e '.[bench,examples]' -e plugins/bonn-qat-baselines
python examples/text.py
"""

import argparse
import re
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import bonn_qat
from bonn_qat.bench import BACKENDS, bench

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--schemes", nargs="+", default=["float", "xnor", "bonn"])
parser.add_argument("--texts", type=int, default=300, help="of each package in the training; the test has a third")
parser.add_argument("--validate", action="store_true", help="on other files than the test's")
arguments = parser.parse_args()

FASTEST = {name: BACKENDS[name] for name in ("onnxruntime float", "packed")}
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
WORDS, VOCABULARY = 32, 2000


def words(path: Path) -> Tensor:
    """The words of a file as numbers: a hash of each."""
    found = re.findall(r"[a-z]{2,}", path.read_text(encoding="utf-8").lower())
    return torch.tensor([zlib.crc32(word.encode()) % VOCABULARY for word in found], dtype=torch.long)


def texts(fold: int, count: int) -> tuple[Tensor, Tensor]:
    """``count`` parts of the files of each package, of which ``fold`` 0 and 1 have a fifth each, and 2 the rest."""
    ids, targets = [], []
    for target, package in enumerate(PACKAGES):
        paths = sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py"))
        own = [i for i in range(len(paths)) if min(i % 5, 2) == fold]
        long = [found for i in own if len(found := words(paths[i])) > WORDS]
        lengths = torch.tensor([float(len(x)) for x in long])
        for i in torch.multinomial(lengths, count, replacement=True, generator=generator):
            start = int(torch.randint(len(long[i]) - WORDS, (), generator=generator))
            ids.append(long[i][start : start + WORDS])
            targets.append(target)
    return torch.stack(ids), torch.tensor(targets)


generator = torch.Generator().manual_seed(arguments.seed)
inputs, targets = texts(2, arguments.texts)
test_inputs, test_targets = texts(0 if arguments.validate else 1, arguments.texts // 3)
config = BertConfig(
    vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
    max_position_embeddings=WORDS, num_labels=len(PACKAGES),
)  # fmt: skip
results, outputs = {}, {}
for scheme in arguments.schemes:
    torch.manual_seed(arguments.seed)
    network = BertForSequenceClassification(config)
    model = bonn_qat.binarize(network, scheme, example_inputs=inputs[:8])
    objective = bonn_qat.Objective(
        model, lambda output, target: torch.nn.functional.cross_entropy(output.logits, target)
    )
    optimizer = torch.optim.AdamW(bonn_qat.parameter_groups(objective, lr=1e-3, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    for _ in range(arguments.epochs):
        objective.train()
        for batch in torch.split(torch.randperm(len(inputs)), 32):
            optimizer.zero_grad()
            objective(inputs[batch], targets[batch]).total.backward()
            optimizer.step()
            bonn_qat.constrain_(model)
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(x).logits for x in torch.split(test_inputs, 64)]).argmax(1)
    report = bench(network, model, backends=FASTEST, batches=[1], threads=[1], rounds=9)
    times = {f"{x.backend} ms": x.median_milliseconds for x in report.latencies}
    accuracy = 100 * float((found == test_targets).float().mean())
    results[scheme] = {"accuracy %": accuracy, "Mbit": bonn_qat.summary(model).mbit, **times}
    outputs[scheme] = found
    print(f"{scheme}: " + ", ".join(f"{name} {value:.2f}" for name, value in results[scheme].items()), flush=True)
