"""A LightningModule: mixing in the training step, a fused head, AdamHD in configure_optimizers."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from regularizers.dropout import MultiSampleDropoutCrossEntropy
from regularizers.optim import AdamHD


class Digits(lightning.LightningModule):
    """A classifier of digits whose last layer is the loss of eight dropout masks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.head = MultiSampleDropoutCrossEntropy(128, 10, p=0.5, num_samples=8)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the fused loss."""
        images, labels = batch
        loss: Tensor = self.head(self.body(images), labels)
        return loss

    def on_train_epoch_start(self) -> None:
        """Let the dropout rate fall from epoch to epoch: assigning is all a schedule does."""
        self.head.p = 0.5 * (1 - self.current_epoch / (self.trainer.max_epochs or 1))

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the accuracy; Lightning has set eval(), so nothing is dropped."""
        images, labels = batch
        accuracy = (self.head.logits(self.body(images)).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy)

    def configure_optimizers(self) -> Any:
        """Decay matrices, and no biases."""
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = AdamHD(groups, lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


def main() -> float:
    """Train for ten epochs; return the accuracy on images that were not seen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*many workers.*")
    lightning.seed_everything(0, verbose=False)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    train, test = random_split(dataset, [1200, 597])
    trainer = lightning.Trainer(
        max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Digits(), DataLoader(train, 60, shuffle=True), DataLoader(test, 597))
    accuracy = trainer.callback_metrics["accuracy"].item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    assert main() > 0.93
