from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mlreviews
from mlreviews.catalogue import Technique
from mlreviews.reproductions import runner
from mlreviews.reproductions.protocol import Outcome, Record, Settings, Verdict
from mlreviews.reproductions.runner import ReproductionError, check_environment, reproduce, reproduce_many

Fakes = dict[str, Technique]
FILES = ["good-fake.json", "good-fake.png", "good-fake.svg"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that has the files of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(f"former {name}")
    return folder


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests run in the background, whose processes are started deaf to it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing good-fake to the output folder."""
    code = """
        import sys
        from pathlib import Path
        from mlreviews.reproductions import runner
        with runner._exclusive("good-fake", Path("out")) as staging:
            (staging / "half.json").touch()
            print("held", flush=True)
            sys.stdin.read()
        """
    code = "\n".join(line[8:] for line in code.splitlines())
    (tmp_path / "out").mkdir(exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def contents(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def experiment(technique: Technique) -> Any:
    return importlib.import_module(technique.reproduction)


def test_importing_the_runner_loads_no_torch() -> None:
    code = "import sys, mlreviews.reproductions.runner; print(*(n in sys.modules for n in ('torch', 'matplotlib')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


# What is written


def test_a_reproduction_writes_record_and_figures(fakes: Fakes, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    record = reproduce(fakes["good-fake"], Settings(seed=4), out)
    assert sorted(contents(out)) == FILES
    stored = Record.read(out / "good-fake.json")
    assert stored.outcome.claims == record.outcome.claims
    assert (record.slug, record.full, record.seed, record.device) == ("good-fake", False, 4, "cpu")
    assert record.outcome.claims[0].verdict is Verdict.HOLDS
    assert record.started.endswith("+00:00")
    png = (out / "good-fake.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">2I", png[16:24]) == (300, 300)  # two inches at 150 dpi
    assert "<svg" in (out / "good-fake.svg").read_text()


def test_settings_reach_the_experiment(fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(settings: Settings) -> Outcome:
        seen.append(settings)
        return Outcome([], {"curve": [1.0]})

    monkeypatch.setattr(experiment(fakes["good-fake"]), "run", run)
    settings = Settings(full=True, seed=7, tracker=lambda items, description, total: items)
    record = reproduce(fakes["good-fake"], settings, out)
    assert seen == [settings]
    assert seen[0].tracker is settings.tracker
    assert (record.full, record.seed) == (True, 7)


def test_the_same_seed_gives_the_same_bytes(fakes: Fakes, tmp_path: Path) -> None:
    """The fake draws from torch's default generator, as a layer does when it is made."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        torch.rand(3)
        reproduce(fakes["good-fake"], Settings(seed=seed), folder)
    figures = [[(folder / name).read_bytes() for name in FILES[1:]] for folder in folders]
    assert figures[0] == figures[1] != figures[2]
    claims = [Record.read(folder / FILES[0]).outcome.claims for folder in folders]
    assert claims[0] == claims[1] != claims[2]
    assert b"<dc:date>" not in figures[0][1]


def test_the_callers_random_numbers_are_left_alone(fakes: Fakes, out: Path) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    reproduce(fakes["good-fake"], Settings(), out)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002


def test_versions_and_machine_without_names_or_paths(fakes: Fakes, out: Path) -> None:
    record = reproduce(fakes["good-fake"], Settings(), out)
    assert record.versions["mlreviews"] == mlreviews.__version__
    assert record.versions["torch"] == torch.__version__
    assert {"python", "numpy", "matplotlib"} <= record.versions.keys()
    assert record.machine.keys() == {"system", "processor", "cores", "threads"}
    assert record.machine["threads"] == torch.get_num_threads()
    assert 1 <= record.machine["cores"] <= (os.cpu_count() or 1)  # type: ignore[operator]
    text = (out / "good-fake.json").read_text()
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert str(out) not in text


def test_versions_of_what_is_not_loaded_are_left_out(fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert "scikit-learn" not in reproduce(fakes["good-fake"], Settings(), out).versions
    monkeypatch.setitem(sys.modules, "sklearn", sys)
    assert "scikit-learn" in reproduce(fakes["good-fake"], Settings(), out).versions


def test_seconds_are_those_of_the_experiment(fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(clock))
    assert reproduce(fakes["good-fake"], Settings(), out).seconds == 2.5


def test_the_processor_is_the_models_name(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : 0\nmodel name\t: Zuse Z3: relay\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert runner._processor() == "Zuse Z3: relay"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "processor : 0\n")
    monkeypatch.setattr(runner.platform, "processor", lambda: "")
    monkeypatch.setattr(runner.platform, "machine", lambda: "z3")
    assert runner._processor() == "z3"
    monkeypatch.setattr(runner.platform, "processor", lambda: "relay")
    assert runner._processor() == "relay"


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    assert runner._machine("cuda:1")["gpu"] == "GPU cuda:1"


# Before the experiment


def test_nothing_runs_without_a_reproduction(fakes: Fakes, out: Path) -> None:
    with pytest.raises(ReproductionError, match=r"^2nd-planned-fake is planned: it has no reproduction$"):
        reproduce(fakes["2nd-planned-fake"], Settings(), out)
    with pytest.raises(ReproductionError, match=r"^written-fake is implemented: it has no reproduction$"):
        reproduce(fakes["written-fake"], Settings(), out)


@pytest.fixture
def never_run(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> Technique:
    def run(settings: Settings) -> Outcome:
        pytest.fail("the experiment was run")

    monkeypatch.setattr(experiment(fakes["good-fake"]), "run", run)
    return fakes["good-fake"]


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda:99", r"."), ("abacus", "Expected one of cpu, cuda"), ("cpu:x", "nvalid"), ("", ".")],
)
def test_the_device_is_checked_first(never_run: Technique, out: Path, device: str, reason: str) -> None:
    with pytest.raises(ReproductionError, match=rf"^device '{device}' can't be used: .*{reason}"):
        reproduce(never_run, Settings(device=device), out)


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_the_output_folder_is_checked_first(never_run: Technique, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("a file")
    out = tmp_path / "file" / below
    with pytest.raises(ReproductionError, match=rf"^can't write to the output folder {out}: .*[Nn]ot a "):
        reproduce(never_run, Settings(), out)
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_can_not_be_written_to(
    never_run: Technique, out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def mkdtemp(*args: Any, **kwargs: Any) -> str:
        raise OSError(number, os.strerror(number))

    before = contents(out)
    monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)
    with pytest.raises(ReproductionError, match=rf"^can't write to the output folder {out}: {os.strerror(number)}$"):
        reproduce(never_run, Settings(), out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("package", "extra", "subject"), [("matplotlib", "plots", "drawing the figures"), ("sklearn", "data", "good-fake")]
)
def test_a_missing_package_is_named_with_its_extra(
    fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, subject: str
) -> None:
    def run(settings: Settings) -> Outcome:
        import sklearn.datasets  # noqa: F401

        return Outcome([], {})

    monkeypatch.setattr(experiment(fakes["good-fake"]), "run", run)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    before = contents(out)
    with pytest.raises(ReproductionError) as caught:
        reproduce(fakes["good-fake"], Settings(), out)
    assert str(caught.value) == f"{subject} needs {package}: pip install 'mlreviews[{extra}]'"
    assert contents(out) == before


def test_a_package_that_no_extra_installs_is_an_error_of_the_reproduction(fakes: Fakes, out: Path) -> None:
    path = fakes["good-fake"].reproduction_file
    path.write_text("import no_such_package\n" + path.read_text())
    importlib.invalidate_caches()
    with pytest.raises(ReproductionError, match=r"good_fake can't be imported: ModuleNotFoundError: .*no_such_package"):
        reproduce(fakes["good-fake"], Settings(), out)


# Failures leave everything as it was


def test_a_failing_experiment_leaves_everything(fakes: Fakes, out: Path) -> None:
    before = contents(out)
    with pytest.raises(ReproductionError) as caught:
        reproduce(fakes["failing-fake"], Settings(), out)
    assert str(caught.value) == "failing-fake: the experiment failed: ValueError: the data are bent"
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.record is None
    assert contents(out) == before


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (lambda: {"claims": []}, "TypeError: run returned dict, expected an Outcome"),
        (lambda: Outcome([], {"curve": 3.0}), "TypeError: 'float' object is not iterable"),  # type: ignore[dict-item]
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_can_not_be_stored_is_an_error_of_the_experiment(
    fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch, outcome: Any, message: str
) -> None:
    monkeypatch.setattr(experiment(fakes["good-fake"]), "run", lambda settings: outcome())
    with pytest.raises(ReproductionError, match=f"^good-fake: the experiment failed: {message}"):
        reproduce(fakes["good-fake"], Settings(), out)


def test_a_file_that_the_experiment_misses_is_named(fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment(fakes["good-fake"]), "run", lambda settings: Path("weights.bin").read_bytes())
    with pytest.raises(ReproductionError) as caught:
        reproduce(fakes["good-fake"], Settings(), out)
    assert str(caught.value) == "good-fake: the experiment failed: No such file or directory: weights.bin"


def test_what_was_measured_outlives_a_failing_figure(fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ReproductionError, match=r"can't be drawn and written to .*: no such colour") as caught:
        reproduce(fakes["undrawable-fake"], Settings(), tmp_path / "out")
    assert caught.value.record is not None
    assert len(caught.value.record.outcome.claims) == 1
    assert contents(tmp_path / "out") == {}


def test_ctrl_c_leaves_everything(fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Outcome:
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after Ctrl-C")

    before = contents(out)
    for name in ("run", "draw"):
        with monkeypatch.context() as patch:
            patch.setattr(experiment(fakes["good-fake"]), name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                reproduce(fakes["good-fake"], Settings(), out)
        assert contents(out) == before


def test_a_full_disk_leaves_everything(fakes: Fakes, out: Path) -> None:
    """The disk takes 5,000 bytes a file, which is enough for the record but not for a figure."""
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(ReproductionError, match=r"^good-fake: its results can't be .*: File too large$"):
            reproduce(fakes["good-fake"], Settings(), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(out) == before
    reproduce(fakes["good-fake"], Settings(), out)  # and nothing is in the way afterwards


@pytest.mark.parametrize("failing", FILES)
@pytest.mark.parametrize("there", [True, False])
def test_files_that_can_not_be_moved_into_place(
    fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch, failing: str, there: bool
) -> None:
    """All three files are replaced, or none."""
    if not there:
        for name in FILES:
            (out / name).unlink()
    before = contents(out)
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if source.name == failing and source.parent.name == ".good-fake.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(runner.os, "replace", full)
    with pytest.raises(ReproductionError, match="No space left on device") as caught:
        reproduce(fakes["good-fake"], Settings(), out)
    assert caught.value.record is not None
    assert contents(out) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_until_all_files_are_in_place(
    fakes: Fakes, out: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        signal.raise_signal(number)
        replace(source, target)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(runner.os, "replace", interrupted)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            reproduce(fakes["good-fake"], Settings(), out)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert sorted(contents(out)) == FILES
    assert Record.read(out / "good-fake.json").slug == "good-fake"
    assert not any(content.startswith(b"former") for content in contents(out).values())


def test_reproductions_run_in_threads_too(fakes: Fakes, out: Path) -> None:
    """Where signal handlers can't be set."""
    done: list[Record] = []
    thread = threading.Thread(target=lambda: done.append(reproduce(fakes["good-fake"], Settings(), out)))
    thread.start()
    thread.join()
    assert done[0].outcome.claims == Record.read(out / "good-fake.json").outcome.claims


# Two processes


def test_a_second_process_is_kept_away(never_run: Technique, out: Path, holder: subprocess.Popen[str]) -> None:
    before = contents(out)
    assert ".good-fake.lock" in before
    message = rf"^another process is writing this reproduction: it holds {out / '.good-fake.lock'}$"
    with pytest.raises(ReproductionError, match=message):
        reproduce(never_run, Settings(), out)
    assert contents(out) == before


@pytest.mark.parametrize("step", ["_lock_handle", "Path.mkdir"])
def test_a_folder_without_locks_or_space(
    never_run: Technique, out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(f"mlreviews.reproductions.runner.{step}", fails)
    before = contents(out)
    message = rf"^can't write to the output folder {out}: No locks available$"
    with pytest.raises(ReproductionError, match=message), runner._exclusive("good-fake", out):
        pytest.fail("went on")
    monkeypatch.undo()
    with runner._exclusive("good-fake", out):  # nothing is held
        pass
    assert contents(out) == before


def test_another_slug_may_be_written_at_the_same_time(fakes: Fakes, out: Path, holder: subprocess.Popen[str]) -> None:
    reproduce(fakes["false-fake"], Settings(), out)
    assert (out / "false-fake.json").is_file()


def test_a_killed_process_holds_nothing(fakes: Fakes, out: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert (out / ".good-fake.tmp" / "half.json").exists()
    reproduce(fakes["good-fake"], Settings(), out)
    assert sorted(contents(out)) == FILES


def test_a_lock_file_that_its_holder_removed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former holder lets go between our opening the file and locking it: we must not hold a file that is gone."""
    lock, taken = tmp_path / ".x.lock", runner._lock_handle

    def slow(handle: int) -> None:
        removals.pop()()
        taken(handle)

    def replaced() -> None:
        lock.unlink()
        lock.touch()

    removals = [lambda: None, replaced, lock.unlink]
    monkeypatch.setattr(runner, "_lock_handle", slow)
    handle = runner._lock(lock)
    assert removals == []
    assert os.path.samestat(os.fstat(handle), lock.stat())
    os.close(handle)


# Several


def test_one_that_fails_does_not_stop_the_others(fakes: Fakes, tmp_path: Path) -> None:
    names = ["failing-fake", "2nd-planned-fake", "good-fake", "undrawable-fake", "false-fake"]
    found = dict(reproduce_many([fakes[name] for name in names], Settings(), tmp_path))
    assert [technique.slug for technique in found] == names
    assert [isinstance(result, ReproductionError) for result in found.values()] == [True, True, False, True, False]


def test_what_none_can_do_without_is_one_error(never_run: Technique, tmp_path: Path) -> None:
    with pytest.raises(ReproductionError, match="device"):
        list(reproduce_many([never_run], Settings(device="abacus"), tmp_path))
    assert list(reproduce_many([], Settings(), tmp_path)) == []


@pytest.mark.parametrize("jobs", [0, -1])
def test_there_is_at_least_one_job(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(ValueError, match=f"jobs: expected at least 1, got {jobs}"):
        list(reproduce_many([], Settings(), tmp_path, jobs))


@pytest.mark.parametrize(("many", "jobs", "cores", "threads"), [(5, 3, 8, 2), (2, 2, 1, 1), (2, 7, 8, 4)])
def test_so_many_at_a_time_share_the_cores(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int, jobs: int, cores: int, threads: int
) -> None:
    """With stand-ins for the processes, which are done at once; real ones are in test_parallel."""
    at_a_time, shares = [], []

    def start(technique: Technique, settings: Settings, out: Path, share: int, running: dict[Any, Any]) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        sender.send("done")
        running[receiver] = sender, technique
        at_a_time.append(len(running))
        shares.append(share)

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "_receive", lambda receiver, sender, technique: receiver.recv())
    monkeypatch.setattr(runner, "_cores", lambda: cores)
    chosen = list(fakes.values())[:many]
    found = list(reproduce_many(chosen, Settings(), tmp_path, jobs))
    assert sorted(technique.slug for technique, _ in found) == sorted(technique.slug for technique in chosen)
    assert {result for _, result in found} == {"done"}
    assert max(at_a_time) == min(jobs, many)
    assert set(shares) == {threads}


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda process: {0: {1, 5, 6}}[process], raising=False)
    assert runner._cores() == 3
    monkeypatch.delattr(runner.os, "sched_getaffinity")
    for known, cores in {7: 7, None: 1}.items():
        monkeypatch.setattr(runner.os, "cpu_count", lambda known=known: known)
        assert runner._cores() == cores


def test_check_environment_leaves_nothing_but_the_folder(tmp_path: Path) -> None:
    check_environment(Settings(), tmp_path / "a" / "b")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/b"]


def test_records_are_json_for_others(fakes: Fakes, out: Path) -> None:
    reproduce(fakes["false-fake"], Settings(), out)
    stored = json.loads((out / "false-fake.json").read_text())
    assert stored["claims"][0]["verdict"] == "does not hold"
    assert stored["series"]["curve"][1] is None
