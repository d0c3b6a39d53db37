"""A bad study is refused before anything starts, with a sentence that names field, value and what it must be."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_files import write

from megasparse.config.loader import ConfigError
from megasparse.studies.format import load_study

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_of_the_repository_are_read(path) -> None:
    assert load_study(path).name == path.stem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": [1]}, r"seedz: unknown setting; did you mean seeds\? must be one of arms, base"),
        ({"seeds": []}, r"seeds: \[\] is not allowed; .* at least 1 item"),
        ({"seeds": [1, 1]}, r"seeds: 1 is there twice"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, r"arms: a is there twice"),
        ({"arms": [{"name": "a", "solve": "depth"}]}, r'arms.0.solve: "depth" is not allowed; must be one of'),
        ({"arms": [{"name": "a/b"}]}, r"arms.0.name"),
        ({"arms": [{"name": "a", "lr": [0]}], "budget": {"flops": 1}}, r"arms.0.lr.0: 0 is not allowed"),
        ({"baselines": ["none"]}, r"baselines: none is no arm; must be one of dense, small, mst"),
        ({"budget": {"share": 0.3, "of": "none"}}, r"budget.of: none is no arm"),
        ({"budget": {"share": 0.3}}, r"budget: .* must be flops, or share and of"),
        ({"budget": {"flops": 1e9, "share": 0.3, "of": "dense"}}, r"must be flops, or share and of"),
        ({"budget": {"share": 0.3, "of": "mst"}}, r"arms: mst has solve steps, .* must be none"),
        ({"lr": [1e-3, 2e-3], "sweep_seed": 2}, r"sweep_seed: 2 is one of seeds \[1, 2\]; must be another one"),
        ({"settings": {"run": {"seed": 3}}}, r"settings.run.seed: 3 is set by the study for each run"),
        ({"lr": [1e-3], "settings": {"optimizer.lr": 3}}, r"settings.optimizer.lr: 3 is set by lr; must be left out"),
        ({"budget": {"steps": 9, "flops": 1e9}}, r"must be flops, or share and of \(an arm\), or steps"),
        ({"budget": {"steps": 9}}, r"arms: small has solve width, but budget is steps"),
        ({"prepare": [{"makes": "x", "run": ["/bin/sh", "x"]}]}, r"run: /bin/sh is no script; must be launch/NAME.py"),
        ({"prepare": [{"makes": "x", "run": ["tools/../x.py"]}]}, r"run: .* is no script"),
        (
            {"arms": [{"name": "a", "baselines": ["b"]}], "budget": {"flops": 1}, "baselines": []},
            r"baselines: b is no arm",
        ),
        ({"processes": 0}, r"processes: 0 is not allowed"),
    ],
)
def test_a_bad_study_is_refused(tmp_path, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(tmp_path, **changes))


def test_files_that_are_no_study(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--study: no such file"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold settings such as"):
        load_study(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("arms: [")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_study(tmp_path / "torn.yaml")
