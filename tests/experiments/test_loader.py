"""Batches: pure in (seed, step), read ahead from anywhere, cut into rows of hosts, each example once an epoch."""

from itertools import islice

import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.data.loader import HostShard, evaluation_dataset, read_ahead, train_dataset
from experiments.data.sources import Subset

SOURCE = list(range(100, 123))  # 23 examples


def transform(example: int) -> dict[str, np.ndarray]:
    return {"value": np.int32(example), "pair": np.array([example, -example])}


def train(batch_size: int = 4, seed: int = 0, host: int = 0, hosts: int = 1, source=SOURCE):
    return train_dataset(source, transform, HostShard(batch_size, host, hosts), seed)


def assert_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_shapes_and_weights():
    batch = train()[0]
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "value": ((4,), np.int32),
        "pair": ((4, 2), np.int64),
        "weights": ((4,), np.float32),
    }
    assert np.all(batch["weights"] == 1)
    np.testing.assert_array_equal(batch["pair"], np.stack([batch["value"], -batch["value"]], axis=1))


def test_a_batch_is_a_function_of_seed_and_step():
    first, again, other = train(), train(), train(seed=1)
    for step in (7, 0, 1000, 7):
        assert_equal(first[step], again[step])
    assert any(not np.array_equal(first[step]["value"], other[step]["value"]) for step in range(3))


@pytest.mark.parametrize("start", [0, 1, 6, 50])
def test_reading_ahead_gives_the_same_batches_from_anywhere(start: int):
    dataset = train()
    for step, batch in enumerate(islice(read_ahead(dataset, start), 15), start):
        assert_equal(batch, dataset[step])


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_rows_of_the_hosts_make_up_the_global_batch(hosts: int):
    for make in (
        lambda **host: train(8, **host),
        lambda host=0, hosts=1: evaluation_dataset(SOURCE, transform, HostShard(8, host, hosts)),
    ):
        whole = make()
        parts = [make(host=host, hosts=hosts) for host in range(hosts)]
        assert {len(part) for part in parts} == {len(whole)}
        for step in range(3):
            rows = [part[step] for part in parts]
            assert {len(part["value"]) for part in rows} == {8 // hosts}
            assert_equal(whole[step], {name: np.concatenate([part[name] for part in rows]) for name in whole[step]})


@pytest.mark.parametrize("batch_size", [4, 23, 50])
def test_every_epoch_has_every_example_once_in_a_new_order(batch_size: int):
    steps = -(-3 * len(SOURCE) // batch_size)
    dataset = train(batch_size)
    values = np.concatenate([dataset[step]["value"] for step in range(steps)])
    epochs = values[: 3 * len(SOURCE)].reshape(3, len(SOURCE))
    assert all(sorted(epoch) == SOURCE for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, SOURCE]}) == 4


@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_evaluation_has_every_example_once_in_order_and_fills_up_with_weight_0(batch_size: int):
    dataset = evaluation_dataset(SOURCE, transform, HostShard(batch_size))
    batches = list(read_ahead(dataset))
    assert {batch["pair"].shape for batch in batches} == {(batch_size, 2)}
    value, weights = (np.concatenate([batch[name] for batch in batches]) for name in ("value", "weights"))
    np.testing.assert_array_equal(value[weights == 1], SOURCE)
    assert np.all(value[weights == 0] == 0)
    assert np.all(np.diff(weights) <= 0)
    assert len(batches) == -(-len(SOURCE) // batch_size)


def test_a_subset_is_a_source():
    subset = Subset(SOURCE, np.array([5, 2]))
    assert [subset[index] for index in range(len(subset))] == [105, 102]


def test_an_error_of_the_source_arrives_as_it_is():
    class Damaged(list):
        def __getitem__(self, index):
            if index == 3:
                raise UserError("example 3 is damaged")
            return super().__getitem__(index)

    with pytest.raises(UserError, match="example 3 is damaged"):
        list(islice(read_ahead(train(source=Damaged(SOURCE))), 6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train(0), "batch_size is 0"),
        (lambda: train(6, hosts=4), "batch_size is 6; it must be a multiple of the 4"),
        (lambda: train(6, host=2, hosts=2), "process_index is 2 of 2"),
        (lambda: train(seed=-1), "seed is -1"),
        (lambda: train(seed=2**32), "seed is 4294967296"),
        (lambda: train(source=[]), "no example"),
        (lambda: evaluation_dataset([], transform, HostShard(4)), "no example"),
    ],
)
def test_mistakes_are_named(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
