"""Whole runs on a real SLURM cluster of two nodes, warned, requeued, cancelled, refused.

The cluster is started here, from installed binaries (tests/launch/slurm_cluster.py), and ends with the tests.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import LIMIT_SECONDS
from runs import REPOSITORY, command, curve, metrics, run, write_corpus
from slurm_cluster import SlurmCluster, why_not
from slurm_jobs import SCRIPTS, settings, submit, wait_until

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as started:
        started.environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
        yield started


def test_a_run_that_is_warned_saves_requeues_itself_and_gives_the_uninterrupted_curve(
    cluster: SlurmCluster, corpus: Path, tmp_path: Path
) -> None:
    """SLURM's own warning before a time limit; one rank on each of two nodes."""
    folder = tmp_path / "with a space"
    words = settings(corpus, folder, "run.name=run", "train.steps=20000")
    number = submit_to(cluster, words, "--time=10", "--warning-seconds=40")
    try:
        wait_for_steps(folder / "run", 3)
        # Until the warning comes they leave the cores to others.
        ranks = [rank_on(cluster, rank) for rank in range(2)]
        for rank in ranks:
            rank.suspend()
        limit_soon(cluster, number)
        warning = "warning before the time limit"
        wait_until(lambda: warning in job_output(folder / "run"), LIMIT_SECONDS, warning)
        for rank in ranks:
            rank.resume()
        stopped_at = last_step_after(cluster, number, folder / "run", restarts=1)
        cluster.start_soon(number, minutes=10)
        wait_for_steps(folder / "run", stopped_at + 3)
        cluster.run("scancel", "--signal=TERM", str(number))
        job = cluster.wait_for_end(number)
    finally:
        output = job_output(folder / "run")
        cluster.run("scancel", str(number), check=False)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), output
    assert "stopped by SIGUSR1" in output, output
    assert "on 127.0.0.[1-2]" in output and f"going on from step {stopped_at}" in output
    last = metrics(folder / "run")[-1]["step"]
    assert last >= stopped_at + 3
    run(command(corpus, tmp_path, "run.name=straight", "train.steps=20000", f"train.stop_after={last}"))
    assert curve(folder / "run") == curve(tmp_path / "straight")


@pytest.mark.exhaustive
def test_torchrun_on_each_node_passes_a_warning_on_and_a_killed_rank_requeues_the_job(
    cluster: SlurmCluster, corpus: Path, tmp_path: Path
) -> None:
    """Two ranks on each of two nodes. The warning comes from scancel, as an operator may send it."""
    folder = tmp_path / "run"
    words = settings(corpus, tmp_path, "run.name=run", "train.steps=20000")
    number = submit_to(cluster, words, "--layout=task-per-node", "--time=10", ranks_per_node=2)
    try:
        wait_for_steps(folder, 3)
        cluster.run("scancel", "--batch", "--signal=USR1", str(number))
        stopped_at = last_step_after(cluster, number, folder, restarts=1)
        assert (folder / "checkpoints" / f"step-{stopped_at:08d}").is_dir() and "stopped by" in job_output(folder)
        cluster.start_soon(number)
        wait_for_steps(folder, stopped_at + 3)
        rank_on(cluster, rank=3).kill()
        last_step_after(cluster, number, folder, restarts=2)
    finally:
        output = job_output(folder)
        cluster.run("scancel", str(number), check=False)
    assert f"going on from step {stopped_at}" in output and "a rank was killed; requeued" in output, output


@pytest.mark.parametrize(
    ("options", "state", "message"),
    [
        ([], "CANCELLED", "cancelled; not requeued"),
        # The run that is warned ends in this way, too.
        pytest.param(*(["--signal=TERM"], "COMPLETED", "stopped as asked; not requeued"), marks=pytest.mark.exhaustive),
    ],
)
def test_a_job_that_is_ended_by_hand_saves_and_stays_away(
    cluster: SlurmCluster, corpus: Path, tmp_path: Path, options: list[str], state: str, message: str
) -> None:
    folder = tmp_path / "run"
    number = submit_to(cluster, settings(corpus, tmp_path, "run.name=run", "train.steps=20000"), "--time=10")
    wait_for_steps(folder, 3)
    cluster.run("scancel", *options, str(number))
    job = cluster.wait_for_end(number)
    wait_until(lambda: message in job_output(folder), LIMIT_SECONDS, f"{message!r} in {job_output(folder)}")
    last = folder / "checkpoints" / f"step-{metrics(folder)[-1]['step']:08d}" / "index.json"
    assert (job["JobState"], job["Restarts"]) == (state, "0") and last.is_file(), job_output(folder)


def test_a_users_mistake_ends_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The data vanish while the job waits in the queue."""
    (tmp_path / "data").mkdir()
    words = settings(write_corpus(tmp_path / "data"), tmp_path, "run.name=run")
    number = submit_to(cluster, words, "--time=10", "--sbatch-option=--hold")
    shutil.rmtree(tmp_path / "data")
    cluster.run("scontrol", "release", str(number))
    job = cluster.wait_for_end(number)
    output = job_output(tmp_path / "run")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), output
    assert f"error: {tmp_path / 'data'}" in output.replace("data.train: ", "") and "must be mended" in output, output


@pytest.mark.exhaustive
def test_a_batch_script_that_was_edited_by_hand_finishes(cluster: SlurmCluster, corpus: Path, tmp_path: Path) -> None:
    words = " ".join(shlex.quote(word) for word in settings(corpus, tmp_path, "run.name=run"))
    changes = {
        "--config configs/gpt2-124m.yaml 'data.train=[{path: data/corpus}]'": words,
        "RANKS_PER_TASK=8 ": "RANKS_PER_TASK=1 ",
        "RUN_FOLDER=runs/gpt2-124m ": f"RUN_FOLDER={tmp_path / 'run'} ",
        "PYTHON=python": f"PYTHON={sys.executable}",
        "--time=04:00:00": "--time=00:10:00",
        "--output=": f"--output={tmp_path}/",
    }
    text = (SCRIPTS / "task_per_node.sbatch").read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "edited.sbatch").write_text(text)
    number = int(cluster.run("sbatch", f"--chdir={REPOSITORY}", str(tmp_path / "edited.sbatch")).split()[-1])
    job = cluster.wait_for_end(number)
    output = (tmp_path / f"slurm-{number}.out").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), output
    assert "the run is finished" in output and len(metrics(tmp_path / "run")) == 24


def limit_soon(cluster: SlurmCluster, number: int) -> None:
    """Give the running job a time limit that lies 60 to 120 seconds ahead: limits are whole minutes.

    SLURM looks every 30 seconds, so that a warning of 40 seconds comes 40 to 70 seconds before it.
    """
    hours, minutes, _ = cluster.job(number)["RunTime"].split(":")
    cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")


def submit_to(cluster: SlurmCluster, words: list[str], *options: str, ranks_per_node: int = 1) -> int:
    size = ["--nodes=2", f"--tasks-per-node={ranks_per_node}"]
    done = submit(words, [*size, *options], cluster.environment, cluster.folder)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def last_step_after(cluster: SlurmCluster, number: int, folder: Path, restarts: int) -> int:
    """The last step that the run wrote down before its job went back into the queue."""
    back = ("PENDING", str(restarts))
    cluster.wait_for_job(number, lambda job: (job["JobState"], job["Restarts"]) == back)
    return metrics(folder)[-1]["step"]


def wait_for_steps(folder: Path, step: int) -> None:
    path = folder / "metrics.jsonl"
    wait_until(
        lambda: path.is_file() and path.read_text().endswith("\n") and metrics(folder)[-1]["step"] >= step,
        LIMIT_SECONDS,
        f"step {step}",
    )


def rank_on(cluster: SlurmCluster, rank: int) -> psutil.Process:
    """The process of a rank: Python, neither a launcher nor one of the shells above it."""
    for process in psutil.process_iter():
        try:
            variables, words = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        ours = variables.get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
        number = variables.get("RANK", variables.get("SLURM_PROCID"))
        if ours and number == str(rank) and words[1:2] == ["-u"] and words[2].endswith("pretrain.py"):
            return process
    raise AssertionError(f"rank {rank} is not running")


def job_output(run_folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(run_folder.glob("job-*/slurm-*.out")))
