"""The dataset of torch.utils.data: the order of training with any loader, any workers, and transformers' Trainer."""

import json
import runpy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from distilllens.batches import Steps
from distilllens.cache_dataset import CacheDataset
from distilllens.collate import Batch, collate
from distilllens.lens import LogitLens
from distilllens.student import Objective, Student
from distilllens.tails import BucketTail
from distilllens_cache import CachedExample, CacheError, CacheReader

TinyCache: Any = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_cache_v1.py"))["TinyCache"]
SIZE, BATCH = 24, 4


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    folder = tmp_path_factory.mktemp("dataset") / "cache"
    return CacheReader(TinyCache(num_examples=SIZE, examples_per_shard=2, scale=0.0).write(folder))


@pytest.fixture
def dataset(reader: CacheReader):
    dataset = CacheDataset(reader)
    yield dataset
    dataset.close()


def places(examples: list[CachedExample]) -> list[int]:
    return [example.index for example in examples]


def loaded(dataset: CacheDataset, **settings: Any) -> list[list[int]]:
    return list(DataLoader(dataset, batch_size=BATCH, collate_fn=places, **settings))


def steps_of_train(reader: CacheReader, first: int, stop: int) -> list[list[int]]:
    steps = Steps(reader, 42, BATCH, 1)
    return [steps.indices(step) for step in range(first, stop)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_plain_loader_gives_the_order_of_train_whatever_its_workers(
    reader: CacheReader, dataset: CacheDataset, num_workers: int
) -> None:
    _ = dataset[0]  # threads are alive when the workers start
    for epoch in range(2):
        dataset.set_epoch(epoch)
        found = loaded(dataset, num_workers=num_workers)
        assert found == steps_of_train(reader, epoch * SIZE // BATCH, (epoch + 1) * SIZE // BATCH)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_workers_that_live_on_take_the_next_epochs_order(reader: CacheReader, dataset: CacheDataset) -> None:
    loader = DataLoader(dataset, batch_size=BATCH, collate_fn=places, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert list(loader) == steps_of_train(reader, epoch * SIZE // BATCH, (epoch + 1) * SIZE // BATCH)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_has_the_same_ids_on_any_number_of_ranks(
    reader: CacheReader, dataset: CacheDataset, world_size: int
) -> None:
    ranks = []
    for rank in range(world_size):
        sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        ranks.append(list(DataLoader(dataset, batch_size=BATCH // world_size, sampler=sampler, collate_fn=places)))
    steps = [sorted(index for part in parts for index in part) for parts in zip(*ranks, strict=True)]
    assert steps == [sorted(step) for step in steps_of_train(reader, 0, SIZE // BATCH)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restored_dataset_gives_what_was_left_and_then_whole_epochs(
    reader: CacheReader, dataset: CacheDataset, num_workers: int
) -> None:
    dataset.set_epoch(1)
    state = json.loads(json.dumps(dataset.state_dict(taken=2 * BATCH)))
    restored = CacheDataset(reader)
    restored.load_state_dict(state)
    assert (restored.epoch, len(restored)) == (1, SIZE - 2 * BATCH)
    restored.set_epoch(1)  # as a loop over epochs does
    per_epoch = SIZE // BATCH
    assert loaded(restored, num_workers=num_workers) == steps_of_train(reader, per_epoch + 2, 2 * per_epoch)
    restored.set_epoch(2)
    assert loaded(restored) == steps_of_train(reader, 2 * per_epoch, 3 * per_epoch)
    with pytest.raises(CacheError, match="seed: the state has 42, this dataset has 1"):
        CacheDataset(reader, seed=1).load_state_dict(state)
    restored.close()


def test_an_item_beyond_the_epoch_is_refused(dataset: CacheDataset) -> None:
    for item in (-1, SIZE):
        with pytest.raises(IndexError, match="of an epoch with 24 left"):
            dataset[item]


def test_a_shuffling_loader_is_warned_about_and_a_plain_one_is_not(tmp_path: Path) -> None:
    cache = TinyCache(num_examples=200, examples_per_shard=50, top_k={2: 1}).write(tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(CacheDataset(cache))
    with pytest.warns(UserWarning, match=r"take shuffle=False, or train_sampling_strategy"):
        loaded(CacheDataset(cache), shuffle=True)


class ForTrainer(torch.nn.Module):
    """A student as transformers' Trainer calls a model."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.seen: list[str] = []

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.seen += batch.ids
        return {"loss": self.student(batch)["total"] / len(batch.next_ids)}


def for_trainer(examples: list[CachedExample]) -> dict[str, Batch]:
    return {"batch": collate(examples, {2: BucketTail(), 4: BucketTail()})}


def trainer(reader: CacheReader, model: Any, folder: Path, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    lens = LogitLens(model, lens_norm="final", vocab_size=50)
    objective = Objective(task="fkl", lens_divergence="jsd", pairs=((1, 2),), lens_weight=1.0, kd_ratio=1.0)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, train_sampling_strategy="sequential", use_cpu=True,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", disable_tqdm=True, logging_steps=1,
        save_strategy="no", **settings,
    )  # fmt: skip
    return Trainer(
        model=ForTrainer(Student(model, lens, objective)),
        args=arguments,
        train_dataset=CacheDataset(reader),
        data_collator=for_trainer,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_trainer_of_transformers_learns_in_the_same_order(
    reader: CacheReader, tiny_model, tmp_path: Path, num_workers: int
) -> None:
    model = tiny_model("llama", num_layers=2, vocab_size=50)
    learner = trainer(reader, model, tmp_path, num_train_epochs=2, dataloader_num_workers=num_workers)
    learner.train()
    expected = [f"row-{index}" for step in steps_of_train(reader, 0, 2 * SIZE // BATCH) for index in step]
    assert learner.model.seen == expected
    losses = [line["loss"] for line in learner.state.log_history if "loss" in line]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_collated_batches_of_a_loader_are_those_of_train(reader: CacheReader, dataset: CacheDataset) -> None:
    loader = DataLoader(dataset, batch_size=BATCH, collate_fn=partial(collate, tails={4: BucketTail()}))
    expected = [tuple(f"row-{index}" for index in step) for step in steps_of_train(reader, 0, SIZE // BATCH)]
    assert [batch.ids for batch in loader] == expected
