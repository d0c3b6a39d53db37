"""Studies of runs that train nothing: side by side, killed, stopped, failing, and what is made of them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import study_files
from study_files import DENSE, write

from megasparse.config.loader import ConfigError, load_config
from megasparse.studies.format import load_study
from megasparse.studies.jobs import inputs_of
from megasparse.studies.running import Stopped, make_slots
from megasparse.studies.study import PAGE, RESULTS, Studied
from megasparse.studies.tables import arm_rows

FAKE = Path(__file__).with_name("fake_run.py")
DRIVER = """
import sys
from pathlib import Path
from megasparse.studies.format import load_study
from megasparse.studies.jobs import inputs_of
from megasparse.studies.running import Stopped
from megasparse.studies.study import Studied
file, fake, seconds = sys.argv[1:]
try:
    Studied(load_study(Path(file)), Path(file)).run(
        lambda job: [sys.executable, fake, str(job.config_file), seconds], lambda text: print(text, flush=True))
except Stopped as stop:
    print(stop)
    sys.exit(stop.status)
"""


def run(file: Path, tell=lambda text: None, known=()) -> dict:
    studied = Studied(load_study(file), file, known)
    return studied.run(lambda job: [sys.executable, str(FAKE), str(job.config_file), "0"], tell)


def start(file: Path, seconds: float) -> processes.Process:
    words = [sys.executable, "-c", DRIVER, file, FAKE, seconds]
    return processes.Process(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def runs_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (folder / "tiny" / "runs").glob("*")}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far in time"
        time.sleep(0.02)


def test_a_study_ends_in_numbers_and_a_page(tmp_path) -> None:
    file = write(tmp_path, lr=[1e-3, 2e-3], processes=2)
    told: list[str] = []
    results = run(file, told.append)
    dense, small, mst = results["arms"]
    assert [arm["lr"] for arm in results["arms"]] == [2e-3] * 3 and [run["lr"] for run in dense["sweep"]] == [
        1e-3,
        2e-3,
    ]
    assert [run["seed"] for run in mst["runs"]] == [1, 2] and mst["n"] == 2
    ends = [2.0 + 10 / mst["hidden_size"] + 0.01 * seed + 1 / mst["steps"] for seed in (1, 2)]
    assert mst["mean"] == pytest.approx(sum(ends) / 2) and mst["spread"] == pytest.approx(0.01 / 2**0.5)
    difference = next(one for one in results["differences"] if one["arm"] == "mst")
    assert difference["mean"] == pytest.approx(mst["mean"] - small["mean"])
    assert (difference["baseline"], difference["n"], difference["below"]) == ("small", 2, 2)
    assert difference["half_width"] == pytest.approx(0.0, abs=1e-9)
    curve = mst["runs"][0]["curve"]
    assert len(curve["val_loss"]) == mst["steps"] and curve["flops_algorithmic"][-1] == 1e6 * mst["steps"]
    assert not results["failures"] and json.loads((tmp_path / "tiny" / RESULTS).read_text()) == results
    page = (tmp_path / "tiny" / PAGE).read_text()
    assert page.count("<svg") == 4 and "Paired differences" in page and f"{difference['mean']:+.4f}" in page
    assert "mst: learning rate 0.002 of 0.001, 0.002" in told
    configs = [
        json.loads(json.dumps(path.read_text())) for path in (tmp_path / "tiny" / "configs").glob("mst*seed1.yaml")
    ]
    assert len(configs) == 1 and "seed: 1\n" in configs[0] and "resume: auto" in configs[0]


def test_what_has_finished_is_not_run_again_and_seeds_can_be_added(tmp_path) -> None:
    run(write(tmp_path))
    told: list[str] = []
    results = run(write(tmp_path, seeds=[1, 2, 3]), told.append)
    assert "6 of 9 runs have finished before" in told and results["arms"][0]["n"] == 3
    assert {lines(path / "starts.txt") for path in runs_of(tmp_path).values()} == {1}


def test_known_results_are_not_run_again(tmp_path) -> None:
    """Those of another place; another number of seeds or another arm changes nothing, another rate does."""
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    first = run(write(tmp_path / "there", lr=[1e-3, 2e-3], seeds=[1, 2]))
    kept = tmp_path / "there" / "tiny" / RESULTS
    second = run(write(tmp_path / "here", lr=[1e-3, 2e-3], seeds=[1, 2]), known=[kept])
    assert not runs_of(tmp_path / "here") and second["arms"] == first["arms"]
    third = run(write(tmp_path / "here", lr=[2e-3, 3e-3], seeds=[1, 2, 3]), known=[kept])
    names = {name.partition("_")[2] for name in runs_of(tmp_path / "here")}
    assert names == {"lr0.003_seed0", "lr0.002_seed3"} and [arm["n"] for arm in third["arms"]] == [3, 3, 3]


@pytest.mark.parametrize("content", [None, "[]", '{"arms": 3}', "{", '{"arms": [{"sweep": [], "runs": [{}]}]}'])
def test_a_file_that_holds_no_results_is_named(tmp_path, content) -> None:
    path = tmp_path / "known.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"--known: .*known.json: .*; must be a results.json of a study"):
        run(write(tmp_path), known=[path])


def test_results_are_there_after_every_run(tmp_path) -> None:
    file, counts = write(tmp_path, seeds=[1, 2], processes=1), []

    def tell(text: str) -> None:
        path = tmp_path / "tiny" / RESULTS
        if "validation loss" in text:
            counts.append(sum(arm["n"] for arm in json.loads(path.read_text())["arms"]) if path.exists() else 0)

    results = run(file, tell)
    assert counts == [0, 1, 2, 3, 4, 5] and [run["seed"] for run in results["arms"][0]["runs"]] == [1, 2]


def test_a_failed_run_is_told_and_stops_no_other(tmp_path) -> None:
    told: list[str] = []
    results = run(write(tmp_path, seeds=[13, 2]), told.append)
    assert [arm["n"] for arm in results["arms"]] == [1, 1, 1]
    assert len(results["failures"]) == 3
    assert all("13 brings bad luck" in reason for reason in results["failures"].values())
    assert results["differences"][0]["half_width"] is None and results["differences"][0]["n"] == 1
    assert sum("failed: error: train.steps: 13" in text for text in told) == 3
    assert "13 brings bad luck" in (tmp_path / "tiny" / PAGE).read_text()


def test_an_arm_whose_sweep_fails_is_left_out(tmp_path) -> None:
    results = run(write(tmp_path, lr=[1e-3, 2e-3], sweep_seed=13))
    assert [arm["n"] for arm in results["arms"]] == [0, 0, 0] and not results["differences"]
    assert results["failures"]["mst"] == "no run of its sweep has a validation loss"


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)]
)
def test_a_study_that_is_killed_or_stopped_goes_on_without_loss(tmp_path, number) -> None:
    file = write(tmp_path, processes=2)
    with start(file, 0.05) as study:
        wait_for(lambda: sum(lines(path / "metrics.jsonl") > 3 for path in runs_of(tmp_path).values()) == 2)
        os.kill(study.pid, number)
        output, _ = study.communicate(timeout=120)
        assert study.returncode == (-9 if number == signal.SIGKILL else 128 + number), output
        # Runs end with the study, whatever has ended it.
        wait_for(lambda: not study.left())
    begun = {name: lines(path / "metrics.jsonl") for name, path in runs_of(tmp_path).items()}
    assert len(begun) == 2 and all(0 < steps < 110 for steps in begun.values())
    results = run(file)
    for name, path in runs_of(tmp_path).items():
        logged = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert logged == list(range(1, len(logged) + 1)), "each step once"
        assert lines(path / "starts.txt") == (2 if name in begun else 1)
    assert [arm["n"] for arm in results["arms"]] == [2, 2, 2] and not results["failures"]


def test_other_settings_are_not_mixed_with_runs_that_are_there(tmp_path) -> None:
    run(write(tmp_path))
    with pytest.raises(ConfigError, match=r"begun with other settings: .*train.steps: 110 -> 120.*; must be another"):
        run(write(tmp_path, budget={"share": 0.3, "of": "dense"}))


def test_other_data_are_not_mixed_with_runs_that_are_there(tmp_path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text("{}")
    settings = {**study_files.SETTINGS, "task": {"path": str(task)}}
    file = write(tmp_path, settings=settings)
    first = run(file)
    task.write_text("[2]")
    with pytest.raises(ConfigError, match="_seed1 was begun on other data or models: .*task.*; must be another"):
        run(file)
    # Nor do results of other data count as known.
    told: list[str] = []
    run(write(tmp_path, settings=settings, name="again"), told.append, [tmp_path / "tiny" / RESULTS])
    assert not any("finished before" in text for text in told)
    task.write_text("{}")
    assert run(write(tmp_path, settings=settings))["arms"] == first["arms"], "nothing was lost"


@pytest.mark.parametrize("field", ["train.init_from", "distillation.teacher"])
def test_models_are_part_of_what_a_run_reads(field, tmp_path) -> None:
    config = load_config([], ["model.vocab_size=64", f"{field}={tmp_path}"])
    found = []
    for content in ("[1]", "[2]", "[1]"):
        (tmp_path / "checksums.json").write_text(content)
        found.append(inputs_of(config))
    assert found[0] == found[2] != found[1]
    without = load_config([], ["model.vocab_size=64"])
    assert set(inputs_of(without)) == {"tokenizer_sha256", "train", "valid"}, "as in results of before"


def test_a_signal_while_a_run_is_being_started_reaches_it(tmp_path) -> None:
    file = write(tmp_path, processes=1)
    studied = Studied(load_study(file), file)

    def command(job) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return [sys.executable, str(FAKE), str(job.config_file), "0.05"]

    with pytest.raises(Stopped):
        studied.run(command, lambda text: None)
    assert all(lines(path / "metrics.jsonl") < 60 for path in runs_of(tmp_path).values())


def test_a_seed_without_a_finite_loss_is_a_failure(tmp_path) -> None:
    file = write(tmp_path)
    run(file)
    (folder,) = (path for name, path in runs_of(tmp_path).items() if name.startswith("mst") and name.endswith("seed2"))
    summary = folder / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"val_loss": math.nan}))
    results = run(file)
    assert [arm["n"] for arm in results["arms"]] == [2, 2, 1]
    assert "not finite" in results["failures"][folder.name]


def test_the_table_shows_what_was_spent(tmp_path) -> None:
    results = run(write(tmp_path))
    runs = results["arms"][2]["runs"]
    results["arms"][2]["runs"] = [{**one, "flops": 2 * results["budget_flops"]} for one in runs]
    assert [row["budget"] for row in arm_rows(results)][2] == "200 %"


def test_a_folder_belongs_to_one_study_at_a_time(tmp_path) -> None:
    file = write(tmp_path)
    with start(file, 1.0) as study:
        wait_for(lambda: runs_of(tmp_path))
        with pytest.raises(ConfigError, match="is in use by another"):
            run(file)
        assert study.poll() is None


def test_cores_and_gpus_are_divided(monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert make_slots(2, 6) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert make_slots(None, 6) == [{"OMP_NUM_THREADS": "1"}] * 6
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in make_slots(None, 3)] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,1,2")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in make_slots(2, 3)] == ["5", "7"]
    with pytest.raises(ConfigError, match="processes: 5 on 4 GPUs"):
        make_slots(5, 6)


def test_arms_of_equal_steps_are_compared_with_their_own_baselines_on_a_task(tmp_path) -> None:
    settings = {**study_files.SETTINGS, "task": {"path": "task.jsonl"}}
    arms = [
        {"name": "dense", "settings": DENSE, "baselines": []},
        {"name": "wide", "settings": {**DENSE, "model.hidden_size": 128}},
        {"name": "third", "settings": DENSE, "baselines": ["wide"]},
    ]
    made = tmp_path / "made"
    prepare = [{"makes": str(made), "run": ["tools/make_tasks.py", "arithmetic"]}]
    changes = {"settings": settings, "arms": arms, "budget": {"steps": 60}, "baselines": ["dense"], "prepare": prepare}
    file = write(tmp_path, **changes)
    results = run(file)
    assert [arm["steps"] for arm in results["arms"]] == [60, 60, 60]
    assert [arm["accuracy"] for arm in results["arms"]] == pytest.approx(
        [1 / 64 + 0.0015, 1 / 128 + 0.0015, 1 / 64 + 0.0015]
    )
    found = {(one["arm"], one["baseline"]): one["mean"] for one in results["accuracy_differences"]}
    assert found == pytest.approx({("wide", "dense"): -1 / 128, ("third", "wide"): 1 / 128})
    assert {(one["arm"], one["baseline"]) for one in results["differences"]} == set(found)
    page = (tmp_path / "tiny" / PAGE).read_text(encoding="utf-8")
    assert "Paired differences of the task accuracy" in page and "task accuracy" in page


def test_a_dry_run_does_not_need_what_is_still_to_be_made(tmp_path) -> None:
    changes = {"train.init_from": str(tmp_path / "nowhere"), "distillation.teacher": str(tmp_path / "nobody")}
    arms = [{"name": "dense", "settings": {**DENSE, **changes}}]
    made = tmp_path / "nowhere"
    prepare = [{"makes": str(made), "run": ["tools/prune.py", "--model", "x"]}]
    file = write(tmp_path, arms=arms, budget={"steps": 20}, baselines=[], prepare=prepare)
    study = load_study(file)
    assert not study.preparations[0].is_done
    assert Studied(study, file, without_models=True).arms[0].config.train.steps == 20
    with pytest.raises(ConfigError, match="no model folder"):
        Studied(study, file)
    made.mkdir()
    assert study.preparations[0].is_done
    (made / "metrics.jsonl").touch()
    (made / "summary.json").write_text('{"finished": false}')
    assert not study.preparations[0].is_done
    (made / "summary.json").write_text('{"finished": true}')
    assert study.preparations[0].is_done
