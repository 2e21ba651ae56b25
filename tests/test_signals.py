"""Signals: heard by one of several hosts, told to the others at once."""

import os
import signal
import time
import types

import jax
import pytest

from sdzero_jax import hosts, signals
from sdzero_jax.errors import Stopped


class Table:
    """The coordinator's table, as far as signals use it."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]


@pytest.fixture
def table(monkeypatch):
    """One of two hosts that has just looked at the table."""
    from jax._src import distributed

    table = Table()
    monkeypatch.setattr(distributed, "global_state", types.SimpleNamespace(client=table))
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr(signals, "_asked", False)
    monkeypatch.setattr(signals, "_told", False)
    monkeypatch.setattr(signals, "_looked", time.monotonic())
    return table


def test_a_signal_is_told_to_the_others_before_the_next_look_is_due(table):
    """Whoever hears it stops asking at once: a later call would never come."""
    assert signals.pending() is None
    signals._received.append(15)
    assert signals.pending() == 15
    assert list(table.values.values()) == ["15"]


def test_the_other_host_hears_of_it_when_it_looks(table, monkeypatch):
    table.values[signals._KEY] = "15"
    assert signals.pending() is None, "it has just looked"
    monkeypatch.setattr(signals, "_looked", time.monotonic() - 2 * signals._SECONDS)
    assert signals.pending() == 15


def test_nobody_asks_the_table_more_often_than_it_should(table, monkeypatch):
    monkeypatch.setattr(signals, "_looked", time.monotonic() - 2 * signals._SECONDS)
    looked = []
    monkeypatch.setattr(Table, "key_value_try_get", lambda self, key: looked.append(key) or "15")
    assert [signals.pending(), signals.pending()] == [15, None] and len(looked) == 1


@pytest.fixture
def installed(monkeypatch):
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr(signals, "_asked", False)
    signals.install()
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_before_anybody_asks_a_signal_stops_at_once(installed):
    """There is nothing to save, and nobody would look at the flag."""
    with pytest.raises(Stopped, match="before anything was begun") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.value.signum == signal.SIGTERM


def test_work_that_asks_is_told_and_so_is_the_person(installed, capfd):
    assert signals.requested() is None
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.requested() == signals.pending() == signal.SIGINT
    assert "stopping as soon as all is saved" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_one_of_several_hosts_never_stops_alone(installed, monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals._received == [signal.SIGTERM]
