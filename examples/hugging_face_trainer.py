"""The Trainer of Transformers with AdamHD and a multi-sample dropout head.

The model is a tiny BERT with random weights that reads a digit as a text of 64 words, the grey
levels of its pixels: no model and no data are fetched.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from regularizers.dropout import MultiSampleDropoutCrossEntropy
from regularizers.optim import AdamHD


class Classifier(nn.Module):
    """BERT, mean over the words, and the fused loss of a linear classifier."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=17, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = MultiSampleDropoutCrossEntropy(32, num_labels, p=0.2, num_samples=8)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Return loss and logits, as the Trainer expects them."""
        features = self.bert(input_ids).last_hidden_state.mean(1)
        return SequenceClassifierOutput(
            loss=self.head(features, labels), logits=self.head.logits(features)
        )


class Texts(Dataset[dict[str, Any]]):
    """Digits as lists of grey levels."""

    def __init__(self, rows: slice) -> None:
        data = load_digits()
        self.words = torch.tensor(data.data[rows]).long()
        self.labels = torch.tensor(data.target[rows])

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of right answers."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def main() -> float:
    """Train for eight epochs; return the accuracy on digits that were not seen."""
    torch.manual_seed(0)
    model = Classifier(10)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=8, per_device_train_batch_size=16, report_to=[],
            per_device_eval_batch_size=256, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        optimizer = AdamHD(model.parameters(), lr=6e-3)
        trainer = Trainer(
            model, arguments, train_dataset=Texts(slice(0, 1200)),
            eval_dataset=Texts(slice(1200, None)), compute_metrics=accuracy,
            optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.train()
        found: float = trainer.evaluate()["eval_accuracy"]
    print(f"test accuracy {found:.3f}")
    return found


if __name__ == "__main__":
    assert main() > 0.6
