"""The transformers callback on a real Trainer and a tiny model built from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs, reason

pytest.importorskip("transformers", reason=reason("transformers"))
pytest.importorskip("accelerate", reason=reason("accelerate"))
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lfm_torch.integrations.transformers import STATE_FILE, LFMTrainerCallback
from lfm_torch.training import Alert

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


def tokens(n: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (n, 8), generator=generator)
    mask = (torch.arange(8) < torch.randint(3, 9, (n, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


class Sentences(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.columns = tokens(32, 1) | {"labels": torch.arange(32) % 2}

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def trainer_of(path: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZE, max_position_embeddings=8))
    settings = {"num_train_epochs": 2, "save_strategy": "epoch", "report_to": [], "disable_tqdm": True, **options}
    arguments = TrainingArguments(str(path), per_device_train_batch_size=8, use_cpu=True, seed=4, **settings)
    return Trainer(model=model, args=arguments, train_dataset=Sentences())


def callback_of(**options: Any) -> LFMTrainerCallback:
    settings = {"reference": "initial", "n_basis": 8, "pooling": "cls", "figures": False, **options}
    return LFMTrainerCallback(tokens(60, 2), "bert.encoder.layer.*", **settings)


@needs("matplotlib")
def test_training_is_untouched_and_logged(tmp_path: Path) -> None:
    alone = trainer_of(tmp_path / "a")
    alone.train()
    watched = trainer_of(tmp_path / "b")
    callback = callback_of(figures=True).attach(watched)
    watched.train()
    torch.testing.assert_close(watched.model.state_dict(), alone.model.state_dict(), rtol=0, atol=0)
    assert [point.step for point in callback.history] == [0, 4, 8]
    logged = [
        entry["lfm/heat/bert.encoder.layer.1"]
        for entry in watched.state.log_history
        if "lfm/heat/bert.encoder.layer.1" in entry
    ]
    assert logged == [point.scores["bert.encoder.layer.1"]["heat"] for point in callback.history[1:]]
    assert {path.name for path in (tmp_path / "b" / "lfm").iterdir()} == {
        "history.json", "history.csv", "curves.png", "layers.png",
    }  # fmt: skip


def test_resuming_continues_the_curve(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    first = callback_of().attach(trainer)
    trainer.train()
    assert (tmp_path / "checkpoint-4" / STATE_FILE).exists()
    again = trainer_of(tmp_path)
    second = callback_of().attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [point.step for point in second.history] == [0, 4, 8]
    assert second.history[1].scores == first.history[1].scores
    assert second.history[2].scores["bert.encoder.layer.1"]["heat"] < 0.999


def test_steps_and_stopping(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_strategy="no", gradient_accumulation_steps=2)
    alert = Alert("heat", below=2.0, stop=True)
    callback = callback_of(every_n_steps=3, alerts=[alert]).attach(trainer)
    trainer.train()
    assert [point.step for point in callback.history] == [0, 3]
    assert trainer.state.global_step == 3


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="monitor must name a metric"):
        callback_of(reference="best")
    with pytest.raises(ValueError, match="every_n_epochs must be between 1"):
        callback_of(every_n_epochs=0)
