"""Reproductions in processes of their own, which take seconds to start: few tests, with much in each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlreviews.catalogue import Technique
from mlreviews.reproductions import runner
from mlreviews.reproductions.protocol import Record, Settings
from mlreviews.reproductions.runner import ReproductionError, reproduce_many
from tests.fakes import Portable


@pytest.fixture
def portable(fakes: dict[str, Technique], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Technique]]:
    from mlreviews import catalogue

    monkeypatch.syspath_prepend(catalogue.PACKAGE / "reproductions")
    return lambda *names: [Portable.of(fakes[name]) for name in names]


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not what():
        assert time.monotonic() < end, "waited for five minutes"
        time.sleep(0.05)


def test_processes_fail_each_for_itself(portable: Callable[..., list[Technique]], tmp_path: Path) -> None:
    chosen = portable("dying-fake", "failing-fake", "good-fake")
    tracked = Settings(seed=5, tracker=lambda items, description, total: items)  # a lambda can't be sent to a process
    found = {technique.slug: result for technique, result in reproduce_many(chosen, tracked, tmp_path, jobs=2)}
    assert found.keys() == {technique.slug for technique in chosen}
    record, failure, death = found["good-fake"], found["failing-fake"], found["dying-fake"]
    assert isinstance(record, Record)
    assert record.outcome.claims == Record.read(tmp_path / "good-fake.json").outcome.claims
    assert (record.seed, record.machine["threads"]) == (5, min(torch.get_num_threads(), max(1, runner._cores() // 2)))
    assert isinstance(failure, ReproductionError)
    assert str(failure) == "failing-fake: the experiment failed: ValueError: the data are bent"
    assert "in run\n    raise ValueError" in failure.__notes__[0]
    assert str(death) == "dying-fake: its process ended with exit code 3"
    assert multiprocessing.active_children() == []
    assert not (tmp_path / ".good-fake.tmp").exists()


@pytest.mark.slow
def test_closing_stops_what_is_still_running(
    portable: Callable[..., list[Technique]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process ends when it is asked to. The other doesn't listen, and is killed."""
    monkeypatch.setattr(runner, "_SECONDS_TO_STOP", 2.0)
    deaf, listening = portable("slow-fake", "slow-too-fake")
    path = deaf.reproduction_file
    path.write_text("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + path.read_text())
    out = tmp_path / "out"
    results = reproduce_many([*portable("failing-fake"), deaf, listening], Settings(), out, jobs=3)
    assert next(results)[0].slug == "failing-fake"
    wait_for(lambda: len(list(Path.cwd().glob("started-*"))) == 2)
    children = [int(file.name.partition("-")[2]) for file in Path.cwd().glob("started-*")]
    assert {child.pid for child in multiprocessing.active_children()} == set(children)
    assert list(out.glob(".*.lock"))
    for child in children:  # Ctrl-C of the terminal reaches them, and is left to the parent
        os.kill(child, signal.SIGINT)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert multiprocessing.active_children() == []
    assert list(out.iterdir()) == []
