"""Prepared sets through TFDS and grain, on GSM8K: order, exact resumption after a kill, hosts."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import pytest

from sdzero_jax.data import epoch_batches, open_split, prepare_set, shuffled_batches
from sdzero_jax.data.questions import read_rows
from sdzero_jax.errors import UserError

DATA = pathlib.Path(__file__).parent / "data" / "questions"
ROOT = pathlib.Path(__file__).parents[1]
SIZE = 7473


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare_set("gsm8k", data_dir=folder, source_dir=DATA)
    return folder


@pytest.fixture(scope="module")
def gsm8k(folder):
    return open_split("gsm8k", "train", data_dir=folder)


class Numbers:
    """Stands for the split where only the order counts; grain asks for nothing else."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return int(index)


def ids(batches, count):
    return [[None if q is None else q.id for q in next(batches)] for _ in range(count)]


def test_the_split_is_the_file_in_order(gsm8k, folder):
    rows = list(read_rows(DATA / "gsm8k_train.jsonl.gz"))
    assert len(gsm8k) == len(rows) == SIZE
    assert [question.prompt for question in gsm8k] == [row["question"] for row in rows]
    assert gsm8k[-1] == gsm8k[SIZE - 1]
    with pytest.raises(IndexError):
        gsm8k[SIZE]
    assert list((folder / "gsm8k").rglob("*.array_record*"))
    assert "tensorflow" not in sys.modules


def test_a_source_travels_to_worker_processes(gsm8k):
    assert pickle.loads(pickle.dumps(gsm8k))[5] == gsm8k[5]


def test_order_through_tfds_is_the_order_of_numbers(gsm8k):
    """Reading and ordering are independent, so that tests of order may use numbers."""
    batches = epoch_batches(gsm8k, 8, 0, remainder="drop")
    numbers = epoch_batches(Numbers(), 8, 0, remainder="drop")
    assert ids(batches, 40) == [[f"gsm8k-train-{n:06d}" for n in next(numbers)] for _ in range(40)]


def test_resumption_at_every_record_of_two_epochs():
    """The state after each record, put into a fresh iterator, goes on with the very next one."""
    options = {"batch_size": 1, "seed": 3, "remainder": "drop"}
    batches = epoch_batches(Numbers(), **options)
    order, states = [], []
    for _ in range(2 * SIZE):
        states.append(json.dumps(batches.get_state()))
        order += next(batches)
    assert sorted(order[:SIZE]) == sorted(order[SIZE:]) == list(range(SIZE))
    assert order[:SIZE] != order[SIZE:] and order[:SIZE] != sorted(order[:SIZE])
    fresh = epoch_batches(Numbers(), **options)
    for record, state in enumerate(states):
        fresh.set_state(json.loads(state))
        assert next(fresh) == [order[record]]
    again = shuffled_batches(Numbers(), 1, 3)
    assert [next(again)[0] for _ in range(SIZE)] == order[:SIZE]


KILLED = """
import json, os, signal, sys
from sdzero_jax.data import epoch_batches, open_split
folder, state, count = sys.argv[1:]
batches = epoch_batches(open_split("gsm8k", "train", data_dir=folder), 512, 11, remainder="pad")
if os.path.exists(state):
    batches.set_state(json.load(open(state)))
for _ in range(int(count)):
    print(" ".join("-" if q is None else q.id for q in next(batches)), flush=True)
with open(state, "w") as file:
    json.dump(batches.get_state(), file)
next(batches)  # work that is lost
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_order_is_identical_after_kills(gsm8k, folder, tmp_path):
    lines = []
    for count in (3, 14):  # within the first epoch, into the second
        command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "state.json"), str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
        assert done.returncode == -signal.SIGKILL, done.stderr
        lines += done.stdout.splitlines()
    whole = epoch_batches(gsm8k, 512, 11, remainder="pad")
    assert lines == [" ".join(i or "-" for i in batch) for batch in ids(whole, 3 + 14)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_two_hosts_see_disjoint_halves_that_make_the_whole(gsm8k, shuffle):
    wanted = {f"gsm8k-train-{n:06d}" for n in range(SIZE)}
    halves = []
    for host in range(2):
        options = {"remainder": "pad", "shuffle": shuffle, "epochs": 1}
        batches = epoch_batches(gsm8k, 16, 5, process_index=host, process_count=2, **options)
        halves.append([q.id for batch in batches for q in batch if q is not None])
    assert len(halves[0]) + len(halves[1]) == SIZE
    assert not set(halves[0]) & set(halves[1])
    assert set(halves[0]) | set(halves[1]) == wanted
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    if not shuffle:
        assert halves[0][:2] == ["gsm8k-train-000000", "gsm8k-train-000002"]


@pytest.mark.parametrize(("hosts", "batch_size"), [(1, 1), (2, 16), (3, 7), (4, 64)])
@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_hosts_see_equally_many_whole_batches_every_epoch(hosts, batch_size, remainder):
    runs = []
    for host in range(hosts):
        batches = epoch_batches(
            Numbers(), batch_size, 1, remainder=remainder, epochs=2, process_index=host, process_count=hosts
        )
        runs.append(list(batches))
    counts = {len(run) for run in runs}
    rounds = SIZE / (hosts * batch_size)
    assert counts == {2 * (int(rounds) if remainder == "drop" else -int(-rounds // 1))}
    assert all(len(batch) == batch_size for run in runs for batch in run)
    half = counts.pop() // 2
    for epoch in (slice(0, half), slice(half, None)):
        seen = [number for run in runs for batch in run[epoch] for number in batch]
        real = [number for number in seen if number is not None]
        assert len(set(real)) == len(real)
        assert len(real) == (half * hosts * batch_size if remainder == "drop" else SIZE)
    first = [batch for run in runs for batch in run[:half]]
    assert first != [batch for run in runs for batch in run[half:]]


def test_dropped_records_change_from_epoch_to_epoch():
    batches = list(epoch_batches(Numbers(), 1000, 2, remainder="drop", epochs=2))
    epochs = [{n for batch in part for n in batch} for part in (batches[:7], batches[7:])]
    assert len(epochs[0]) == len(epochs[1]) == 7000 and epochs[0] != epochs[1]


@pytest.mark.parametrize("taken", [0, 1, 466, 467, 468, 900])
def test_a_host_resumes_exactly(taken):
    options = {"remainder": "pad", "process_index": 1, "process_count": 2}
    batches = epoch_batches(Numbers(), 8, 9, **options)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    wanted = [next(batches) for _ in range(500)]
    fresh = epoch_batches(Numbers(), 8, 9, **options)
    fresh.set_state(state)
    assert [next(fresh) for _ in range(500)] == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "a batch of 0 from 7473 records"),
        ({"process_index": 2, "process_count": 2}, "host 2 of 2; wanted 0 to 1"),
        ({"remainder": "dorp"}, "remainder='dorp'; choose from drop, pad"),
        ({"batch_size": 4000, "process_count": 2}, "7473 records do not fill 2 batches of 4000; pad them"),
    ],
)
def test_impossible_sizes_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        epoch_batches(Numbers(), **{"batch_size": 4, "seed": 0, "remainder": "drop", **options})
    with pytest.raises(UserError, match="from 0 records"):
        epoch_batches([], 4, 0, remainder="pad")
