"""SLURM jobs without SLURM: what is written and refused, and what a job does when its step ends."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import processes
import psutil
import pytest
from runs import REPOSITORY, write_corpus
from slurm_jobs import SCRIPTS, settings, submit, wait_until

from megasparse.config.loader import ConfigError, load_config
from megasparse.launching.submission import (
    END_OF_HEAD,
    TEMPLATES,
    SlurmJob,
    freeze_code,
    render,
    time_limit_seconds,
    write_job,
)
from megasparse.training.preparation import check_start


def check_and_write(config, job):
    """As launch/slurm/submit.py does."""
    check_start(config, job.world_size, job.device)
    return write_job(config, job, REPOSITORY)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


# What is written, and what is refused.


def test_submit_freezes_code_and_configuration_and_calls_sbatch(corpus: Path, tmp_path: Path) -> None:
    """sbatch is a stand-in that shows how it was called."""
    stand_in(
        tmp_path / "bin" / "sbatch", f'printf "%s\\n" "$@" "${{DS_ACCELERATOR-unset}}" >{tmp_path}/called; echo 17'
    )
    done = submit(
        settings(corpus, tmp_path / "runs", "run.name=frozen"),
        ["--nodes=2", "--tasks-per-node=2", "--time=1-12", "--gpus-per-node=4", "--sbatch-option=--comment=a b"],
        {**without(os.environ, "DS_ACCELERATOR"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        tmp_path,
    )
    folder = tmp_path / "runs" / "frozen" / "job-1"
    assert done.returncode == 0 and done.stdout == f"written: {folder}\n17\n", done.stderr
    # The plan is made on the CPU, and the job does not inherit that.
    assert (tmp_path / "called").read_text().splitlines() == [str(folder / "job.sbatch"), "unset"]
    config = load_config([folder / "config.yaml"])
    assert config.train.resume == "auto" and config.model.hidden_size == 64
    for name in ("launch/pretrain.py", "launch/slurm/job.sh", "megasparse/training/loop.py", "setup.py"):
        assert (folder / "code" / name).read_bytes() == (REPOSITORY / name).read_bytes(), name
    assert not list((folder / "code").rglob("*.pyc"))
    script = (folder / "job.sbatch").read_text()
    for option in ("--nodes=2", "--ntasks-per-node=2", "--time=1-12", "--gpus-per-node=4", "'--comment=a b'"):
        assert f"#SBATCH {option}\n" in script, option
    for option in ("--signal=B:USR1@180", "--requeue", "--open-mode=append", f"--chdir={tmp_path}"):
        assert f"#SBATCH {option}\n" in script, option
    assert "array" not in script


def test_a_dry_run_writes_all_and_submits_nothing(corpus: Path, tmp_path: Path) -> None:
    stand_in(tmp_path / "bin" / "sbatch", f"touch {tmp_path}/called")
    words = ["--nodes=2", "--tasks-per-node=1", "--time=30", "--dry-run"]
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = submit(settings(corpus, tmp_path / "my runs"), words, environment, tmp_path)
    script = tmp_path / "my runs" / "run" / "job-1" / "job.sbatch"
    assert done.returncode == 0 and shlex.split(done.stdout.splitlines()[1]) == ["sbatch", str(script)], done.stderr
    assert script.is_file() and not (tmp_path / "called").exists()
    refused = submit(settings(corpus, tmp_path / "other"), [*words, "--warning-seconds=1800"], environment, tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: --warning-seconds: 1800"), refused.stderr
    assert not (tmp_path / "other").exists()


def test_runs_that_cannot_start_are_refused_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    job = SlurmJob(nodes=2, tasks_per_node=1, time="10")
    cases = {
        "train.global_batch_size=12": "train.global_batch_size: 12",
        "data.train=[{path: /nowhere/corpus}]": "/nowhere/corpus",
        "data.train=null": "data.train: unset",
    }
    for override, message in cases.items():
        with pytest.raises(ValueError, match=message):
            check_and_write(load_config([], settings(corpus, tmp_path / "runs", override)), job)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").mkdir()
    (tmp_path / "runs" / "run" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run already.*train.resume=auto"):
        check_and_write(load_config([], settings(corpus, tmp_path / "runs")), job)
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["run", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nodes": 0}, "--nodes: 0; must be 1 or more"),
        ({"tasks_per_node": -1}, "--tasks-per-node: -1"),
        ({"max_restarts": -1}, "--max-restarts: -1; must be 0 or more"),
        ({"gpus_per_node": 0}, "--gpus-per-node: 0"),
        ({"layout": "task-per-rack"}, "--layout: 'task-per-rack'; must be one of task-per-rank, task-per-node"),
        ({"time": "soon"}, "--time: 'soon'; must be MINUTES"),
        ({"time": "0"}, "--time: '0'"),
        ({"time": "3"}, "--warning-seconds: 180 is not below --time 3; must be 1 to 179"),
        ({"setup": Path("nowhere.sh")}, "--setup: no such file: nowhere.sh"),
        ({"options": ("-N4",)}, "--sbatch-option: '-N4'"),
        ({"options": ("--comment=a\n#SBATCH --nodes=9",)}, "--sbatch-option"),
        ({"options": ("--comment=a\r",)}, "--sbatch-option"),
        ({"partition": "a\ntouch b"}, "--partition: 'a\\ntouch b' holds the control character '\\n'"),
        ({"account": "a\x85b"}, "--account: 'a\\x85b'"),
        ({"setup": Path("a\nb")}, "--setup: 'a\\nb'"),
        ({"time": "\u0663"}, "--time: "),
    ],
)
def test_impossible_jobs_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SlurmJob(**{"nodes": 2, "tasks_per_node": 2, "time": "04:00:00", **wrong})
    assert message in str(refused.value)


def test_a_folder_with_a_line_break_reaches_no_batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a\ntouch b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    job = SlurmJob(nodes=2, tasks_per_node=2, time="04:00:00")
    with pytest.raises(ConfigError, match="run.folder: .* holds the control character"):
        write_job(load_config([]), job, REPOSITORY)
    assert not list(folder.iterdir())


def test_time_limits_are_read_as_sbatch_does() -> None:
    cases = {"90": 5400, "90:30": 5430, "04:00:00": 14400, "2-12": 216000, "1-00:30": 88200, "1-01:01:01": 90061}
    assert {text: time_limit_seconds(text) for text in cases} == cases


def test_what_is_edited_later_does_not_reach_a_job(tmp_path: Path) -> None:
    """Of a checkout: the working tree, new files included, ignored ones not. Of a plain folder: all but caches."""
    source = tmp_path / "source"
    (source / "megasparse" / "__pycache__").mkdir(parents=True)
    (source / ".gitignore").write_text("*.log\n__pycache__/\n")
    for name in ("megasparse/old.py", "megasparse/new.py", "megasparse/x.log", "megasparse/__pycache__/a.pyc", "notes"):
        (source / name).write_text(f"{name} 1")
    freeze_code(source, tmp_path / "plain")
    assert files(tmp_path / "plain") == ["megasparse/new.py", "megasparse/old.py", "megasparse/x.log"]
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "megasparse/old.py"], ["commit", "-q", "-m", "first"]):
        assert processes.run([*git, *words]).returncode == 0
    (source / "megasparse" / "old.py").write_text("edited")
    freeze_code(source, tmp_path / "frozen")
    (source / "megasparse" / "old.py").write_text("edited again")
    assert files(tmp_path / "frozen") == ["REVISION", "megasparse/new.py", "megasparse/old.py"]
    assert (tmp_path / "frozen" / "megasparse" / "old.py").read_text() == "edited"
    revision = (tmp_path / "frozen" / "REVISION").read_text().splitlines()
    assert len(revision[0]) == 40
    assert [line.split() for line in revision[1:]] == [["M", "megasparse/old.py"], ["??", "megasparse/new.py"]]


@pytest.mark.parametrize("layout", TEMPLATES)
def test_a_job_is_the_file_that_people_may_edit_with_another_head(layout: str, tmp_path: Path) -> None:
    template = (SCRIPTS / TEMPLATES[layout]).read_text()
    folder = tmp_path / "it's 100% $HOME"
    script = render(SlurmJob(2, 8, "04:00:00", layout), "x", folder, folder / "job-1", template)
    assert script.partition(END_OF_HEAD)[2] == template.partition(END_OF_HEAD)[2]
    (tmp_path / "head.sh").write_text(script.partition(END_OF_HEAD)[0] + 'printf "%s\\n" "${SETTINGS[1]}" "$CODE"')
    shown = processes.run(["bash", tmp_path / "head.sh"])
    assert shown.stdout.splitlines() == [str(folder / "job-1" / "config.yaml"), str(folder / "job-1" / "code")]
    assigned = {line.partition("=")[0] for line in script.partition(END_OF_HEAD)[0].splitlines() if line[:1].isupper()}
    edited = {line.partition("=")[0] for line in template.partition(END_OF_HEAD)[0].splitlines() if line[:1].isupper()}
    assert edited <= assigned


# What a job does when its step ends. srun and scontrol are stand-ins; the job's scripts are the real ones.


RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["STAND_IN"])
assert "RANK" not in os.environ
rank = int(os.environ["SLURM_PROCID"])
names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
(folder / f"rank-{rank}").write_text(" ".join(os.environ[name] for name in names))
act = os.environ["ACTS"].split()[rank]
if act == "wait":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    (folder / f"waits-{rank}").touch()
    time.sleep(3600)
if act == "finish":
    (folder / "summary.json").write_text('{"finished": true}')
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(0 if act == "finish" else int(act))
"""

# Like srun: starts two tasks, passes SIGUSR1 on, ends with the highest status.
SRUN = """
shift
trap 'kill -s USR1 $(jobs -p)' USR1
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NODEID=$task SLURM_STEP_NUM_TASKS=2 "$@" &
done
highest=0
for task in $(jobs -p); do
    while :; do
        wait "$task"
        status=$?
        kill -0 "$task" 2>/dev/null || break
    done
    ((status > highest)) && highest=$status
done
exit $highest
"""

SCONTROL = """
case $1 in
    requeue) echo "$2" >>"$STAND_IN/requeued" ;;
    show) [[ $2 == hostnames ]] && printf 'first\\nsecond\\n' || echo "JobState=RUNNING Reason=$REASON" ;;
esac
"""


class JobOnStandIns:
    """A rendered job whose srun and scontrol are the scripts above, and whose ranks do as `acts` says."""

    def __init__(self, folder: Path, acts: str, *, restarts: int = 0, reason: str = "None", setup: str = "") -> None:
        self.folder = folder
        stand_in(folder / "bin" / "srun", SRUN)
        stand_in(folder / "bin" / "scontrol", SCONTROL)
        stand_in(folder / "bin" / "python", RANK, interpreter=sys.executable)
        (folder / "setup.sh").write_text(setup)
        job = SlurmJob(2, 1, "10", max_restarts=3, setup=folder / "setup.sh")
        template = (SCRIPTS / TEMPLATES["task-per-rank"]).read_text()
        (folder / "code").symlink_to(REPOSITORY)
        (folder / "job.sbatch").write_text(render(job, "x", folder, folder, template))
        variables = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "two", "STAND_IN": str(folder), "RANK": "77"}
        variables |= {"ACTS": acts, "REASON": reason, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
        if restarts:
            variables["SLURM_RESTART_COUNT"] = str(restarts)
        self.process = processes.Process(
            ["bash", folder / "job.sbatch"],
            env={**without(os.environ, "OMP_NUM_THREADS"), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def wait_for_ranks(self) -> None:
        signs = [self.folder / f"waits-{rank}" for rank in (0, 1)]
        try:
            wait_until(lambda: all(sign.exists() for sign in signs), processes.LIMIT_SECONDS, "the ranks")
        except BaseException:
            self.process.end()
            raise

    def end(self) -> tuple[int, bool, str]:
        """Exit status, whether it requeued itself, and what it said."""
        with self.process:
            output, _ = self.process.communicate(timeout=processes.LIMIT_SECONDS)
        return self.process.returncode, (self.folder / "requeued").exists(), output


@pytest.mark.parametrize(
    ("acts", "status", "requeued", "message"),
    [
        ("finish 0", 0, False, "the run is finished"),
        ("0 0", 0, False, "stopped as asked"),
        ("3 3", 0, True, "a rank was lost"),
        ("3 die", 0, True, "a rank was killed"),
        ("1 die", 0, True, "a rank was killed"),
        ("2 2", 2, False, "must be mended"),
        ("3 2", 2, False, "must be mended"),
        ("1 3", 1, False, "a rank failed"),
        ("127 0", 1, False, "the step failed"),
    ],
)
def test_what_a_job_does_after_its_step(tmp_path: Path, acts: str, status: int, requeued: bool, message: str) -> None:
    found_status, found_requeued, output = JobOnStandIns(tmp_path, acts).end()
    assert (found_status, found_requeued) == (status, requeued) and message in output, output
    # Who the ranks are follows from SLURM, not from what the submitting shell held.
    assert (tmp_path / "rank-0").read_text() == "0 0 2 first 21234 1"
    assert (tmp_path / "rank-1").read_text() == "1 0 2 first 21234 1"


def test_a_warning_reaches_the_ranks_and_the_job_requeues_itself_within_the_cap(tmp_path: Path) -> None:
    for restarts, expected in ((0, (0, True)), (2, (0, True)), (3, (1, False))):
        folder = tmp_path / str(restarts)
        folder.mkdir()
        job = JobOnStandIns(folder, "wait wait", restarts=restarts)
        job.wait_for_ranks()
        job.process.send_signal(signal.SIGUSR1)
        status, requeued, output = job.end()
        assert (status, requeued) == expected, output
    assert "restarted 3 times already, and no more are allowed" in output


def test_a_lost_rank_is_not_requeued_beyond_the_cap(tmp_path: Path) -> None:
    status, requeued, output = JobOnStandIns(tmp_path, "3 3", restarts=3).end()
    assert (status, requeued) == (1, False), output


def test_a_warning_during_the_set_up_starts_no_step(tmp_path: Path) -> None:
    status, requeued, output = JobOnStandIns(tmp_path, "0 0", setup="kill -s USR1 $$\nsleep 0.1\n").end()
    assert (status, requeued) == (0, True) and not (tmp_path / "rank-0").exists(), output


def test_a_failing_set_up_is_not_requeued(tmp_path: Path) -> None:
    status, requeued, output = JobOnStandIns(tmp_path, "0 0", setup="false\n").end()
    assert (status, requeued) == (2, False) and "setup.sh failed" in output


@pytest.mark.parametrize(("reason", "requeues"), [("None", False), ("TimeLimit", True)])
def test_a_cancelled_job_stays_away_and_one_over_its_time_comes_back(
    tmp_path: Path, reason: str, requeues: bool
) -> None:
    job = JobOnStandIns(tmp_path, "wait wait", reason=reason)
    job.wait_for_ranks()
    # SLURM sends it to the batch script and to the tasks.
    for process in [psutil.Process(job.process.pid), *psutil.Process(job.process.pid).children(recursive=True)]:
        # One that has ended by itself meanwhile needs no signal.
        with suppress(psutil.NoSuchProcess):
            if process.name() != "srun":
                process.send_signal(signal.SIGTERM)
    _, requeued, output = job.end()
    assert requeued == requeues, output


def stand_in(path: Path, text: str, interpreter: str = "/bin/bash") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def without(variables: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in variables.items() if key != name}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
