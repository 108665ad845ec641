"""A run's directory: one trainer at a time, in whatever thread or process."""

import os
import re
import threading
import time

import pytest

import gptk
import training_runs
from gptk.cli import main
from gptk.runs.directory import RunDirectory
from gptk.system import files
from gptk.training.trainer import Trainer
from training_runs import SMALL, config, finish, in_child, wait_for

IN_USE = "is in use by another trainer, in this process or another"


def test_of_two_trainers_started_in_one_folder_the_second_is_refused(tmp_path):
    first = Trainer.start(config(steps=2), tmp_path / "run")
    with pytest.raises(gptk.TrainingError, match=IN_USE):
        Trainer.start(config(steps=2), tmp_path / "run")
    assert first.train() == "finished"
    with pytest.raises(gptk.TrainingError, match="holds a run already"):
        Trainer.start(config(steps=2), tmp_path / "run")


def test_two_trainers_made_before_either_trained_do_not_overwrite_each_other(tmp_path):
    """They claim the directory late, as they were not made by `start`."""
    run = tmp_path / "run"
    prepared = Trainer.start(config(steps=2))
    trainers = [
        Trainer(
            prepared.model, prepared.train_windows, prepared.validation_windows, config(), run=run
        )
        for _ in range(2)
    ]
    trainers[0].step()
    trainers[0].save()
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for _ in range(2):
        for go_on in (trainers[1].train, trainers[1].save):
            with pytest.raises(gptk.TrainingError, match="holds a run already"):
                go_on()
        trainers[0].close()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


def test_a_trainer_that_goes_on_after_another_trained_is_refused(tmp_path):
    first = Trainer.start(config(steps=3), tmp_path / "run")
    first.step()
    first.save()
    first.close()
    assert Trainer.resume(tmp_path / "run").train() == "finished"
    best = gptk.best_checkpoint(tmp_path / "run")
    for go_on in (first.train, first.save):
        with pytest.raises(gptk.TrainingError, match="another trainer has changed"):
            go_on()
    assert gptk.best_checkpoint(tmp_path / "run") == best
    assert Trainer.resume(tmp_path / "run", ["steps=4"]).train() == "finished"


def test_a_trainer_that_nobody_has_any_more_frees_the_directory(tmp_path):
    trainer = Trainer.start(config(), tmp_path / "run")
    trainer.itself = trainer  # a cycle, which only the garbage collector finds
    del trainer
    Trainer.start(config(), tmp_path / "run")


def test_a_resumption_that_fails_frees_the_directory(tmp_path):
    Trainer.start(config(steps=2), tmp_path / "run").train()
    for changes in (["width=64"], ["batch_size=1000000"]):
        with pytest.raises(gptk.GptkError):
            Trainer.resume(tmp_path / "run", changes)
    Trainer.resume(tmp_path / "run")


def test_a_start_that_fails_makes_no_directory(tmp_path):
    with pytest.raises(gptk.DataError):
        Trainer.start(config(batch_size=10**6), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_one_of_many_threads_gets_the_directory(tmp_path):
    claims = [RunDirectory(tmp_path / "run") for _ in range(8)]
    together, failed = threading.Barrier(len(claims)), []

    def claim(directory):
        together.wait()
        try:
            directory.claim()
        except gptk.TrainingError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=claim, args=(directory,)) for directory in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == len(claims) - 1
    assert all(IN_USE in line for line in failed)


def test_the_claim_ends_with_the_process_that_has_it(tmp_path):
    run = tmp_path / "run"
    child = in_child(training_runs.train_until_killed, SMALL, run, 3)
    wait_for(run / "waits")
    for attempt in (Trainer.start, lambda _, run: Trainer.resume(run)):
        with pytest.raises(gptk.TrainingError, match=IN_USE):
            attempt(config(), run)
    child.kill()
    child.join()
    Trainer.start(config(steps=1), run).train()


def test_of_programs_started_at_once_one_trains(tmp_path):
    children = [in_child(start, tmp_path / "run", tmp_path / f"said-{n}") for n in range(4)]
    finish(*children)
    said = [path.read_text() for path in tmp_path.glob("said-*")]
    assert said.count("finished") == 1
    assert sum(IN_USE in line or "holds a run already" in line for line in said) == 3
    assert Trainer.resume(tmp_path / "run").step_count == 2


def start(run, said):
    try:
        ending = Trainer.start(config(steps=2), run).train()
    except gptk.TrainingError as error:
        said.write_text(str(error))
    else:
        said.write_text(ending)


def test_what_others_write_there_meanwhile_leaves_the_run_alone(tmp_path, capsys, monkeypatch):
    """A model is not converted into the run; a plot is drawn."""
    run = tmp_path / "run"
    trainer = Trainer.start(config(steps=4, save_every=1), run)

    def command(*words):
        monkeypatch.setattr("sys.argv", ["gptk", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    def step_with_others(step=trainer.step):
        if trainer.step_count == 2:
            assert command("convert", run, run, "--to", "gptk") == 1
            assert "is not overwritten" in capsys.readouterr().err
            assert command("plot", run) == 0
            assert command("train", "--resume", run) == 1
            assert IN_USE in capsys.readouterr().err
        return step()

    trainer.step = step_with_others
    assert trainer.train() == "finished"


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda run: run.touch(), "run is a file; a run needs a directory"),
        (lambda run: run.symlink_to("nothing/there"), "cannot be written"),
        (lambda run: (run.mkdir(), (run / ".lock").mkdir()), "not a regular file"),
        (lambda run: (run.mkdir(), (run / "checkpoints").touch()), "checkpoints"),
        (lambda run: (run.mkdir(), (run / "metrics.jsonl").mkdir()), "metrics.jsonl is a dir"),
        (lambda run: (run.mkdir(), (run / "samples.txt").mkdir()), "run/samples.txt cannot be wri"),
    ],
)
def test_what_is_in_the_way_is_told_in_a_line(make, line, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(gptk.GptkError, match=line):
        Trainer.start(config(steps=1, save_every=1), tmp_path / "run").train()


def test_errors_name_the_file_that_was_to_be_written_and_no_temporary_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file/x", tmp_path / "none/x"):
        with pytest.raises(OSError, match=rf"\] [\w ]+: '{re.escape(str(path))}'$"):
            files.write_text(path, "x")

    def write(folder):
        (folder / "none/x").touch()

    with pytest.raises(gptk.SourceError) as refused:
        files.write_directory(tmp_path / "model", write, what="model")
    assert str(refused.value) == f"{tmp_path}/model cannot be written: No such file or directory"


def test_temporary_files_of_killed_trainers_go_after_a_day(tmp_path):
    Trainer.start(config(steps=1), tmp_path / "run").train()
    for name, age in ((".config.toml.0.new", 25), (".losses.png.0.new", 23)):
        (tmp_path / "run" / name).touch()
        os.utime(tmp_path / "run" / name, (time.time() - age * 3600,) * 2)
    Trainer.resume(tmp_path / "run")
    assert not (tmp_path / "run/.config.toml.0.new").exists()
    assert (tmp_path / "run/.losses.png.0.new").exists()
