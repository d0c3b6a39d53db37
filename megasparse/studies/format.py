"""The file of a study: a strict, immutable schema, and its reader.

    study = load_study(path := Path("configs/studies/quick.yaml"))
    config = study.config(study.arms[0], path)           # as the arm would be trained, before anything is solved

configs/studies/README.md describes the format. Settings of runs are those of ``config/schema.py``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator

from megasparse.checkpoint.tensor_files import read_json
from megasparse.config.loader import ConfigError, check_values, load_config
from megasparse.config.schema import NonNegativeInt, PositiveFloat, PositiveInt, RunConfig, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]
Rates = Annotated[list[PositiveFloat], Field(min_length=1)]

OF_THE_STUDY = ("run.name", "run.folder", "run.seed", "train.resume", "train.stop_after")
"""What arms may not set: the study gives each run its own."""


class Budget(Section):
    """Algorithmic FLOPs of a whole run: a number, or a share of what an arm needs."""

    flops: PositiveFloat | None = None
    """Absolute."""
    share: PositiveFloat | None = None
    """Of the FLOPs of the arm `of`, with its own steps."""
    of: str | None = None
    """Name of an arm with `solve: none`."""
    steps: PositiveInt | None = None
    """Steps of every arm, instead of FLOPs."""

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Budget:
        given = self.model_dump(exclude_none=True)
        one = sum(value is not None for value in (self.flops, self.share, self.steps)) == 1
        if not one or (self.share is None) != (self.of is None):
            raise ValueError(f"budget: {given} is not one budget; must be flops, or share and of (an arm), or steps")
        return self


class Preparation(Section):
    """What is made once before the arms run, such as a pruned model; left out where it is there already."""

    makes: str
    """File or folder that it makes; a run folder counts when the run has finished."""
    run: Annotated[list[str], Field(min_length=1)]
    """A script of `launch/` or `tools/`, and its words."""

    @model_validator(mode="after")
    def _is_a_script_of_ours(self) -> Preparation:
        script = PurePosixPath(self.run[0])
        if script.parent.name not in ("launch", "tools") or len(script.parts) != 2 or script.suffix != ".py":
            raise ValueError(f"run: {self.run[0]} is no script; must be launch/NAME.py or tools/NAME.py")
        return self

    @property
    def is_done(self) -> bool:
        path = Path(self.makes)
        summary = path / "summary.json"
        if (path / "metrics.jsonl").is_file():
            return summary.is_file() and read_json(summary).get("finished") is True
        return path.exists()


class Arm(Section):
    """One recipe."""

    name: Name
    """In tables, and the beginning of its runs' names."""
    settings: dict[str, Any] = {}
    """Over those of the study, in sections or dotted."""
    solve: Literal["steps", "width", "none"] = "steps"
    """What is chosen to spend the budget: train.steps; model.hidden_size, then the steps for what is left over;
    none: nothing, the arm costs what it costs."""
    lr: Rates | None = None
    """Learning rates to try; unset: those of the study."""
    baselines: list[str] | None = None
    """Names of the arms to which it is compared; unset: those of the study."""


class Study(Section):
    name: Name
    """Title, and the name of its folder."""
    folder: str = "runs"
    """Folder that holds the folders of studies."""
    prepare: Literal["quickstart"] | list[Preparation] | None = None
    """What is made first where it is missing: the data of launch/quickstart.sh, or steps in their order."""
    base: list[str] | str = []
    """Configuration files of all arms, relative to the file of the study."""
    settings: dict[str, Any] = {}
    """Of all arms, over those of `base`, in sections or dotted."""
    budget: Budget
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """A run of every arm for each: the same initial weights and order of data in all arms of equal shape."""
    sweep_seed: NonNegativeInt = 0
    """On which learning rates are tried; must be none of `seeds`."""
    lr: Rates | None = None
    """Learning rates to try for each arm, the best is used; unset: optimizer.lr alone."""
    processes: PositiveInt | None = None
    """Runs at a time; unset: one for each GPU, or for each core of a machine without."""
    arms: Annotated[list[Arm], Field(min_length=1)]
    baselines: list[str] = []
    """Names of the arms to which the others are compared."""

    @model_validator(mode="after")
    def _names_and_seeds_are_distinct(self) -> Study:
        names = [arm.name for arm in self.arms]
        for field, values in (("arms", names), ("seeds", [str(seed) for seed in self.seeds])):
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{field}: {twice[0]} is there twice; must be different ones")
        of_arms = [name for arm in self.arms for name in arm.baselines or []]
        for field, wanted in (("baselines", [*self.baselines, *of_arms]), ("budget.of", [self.budget.of])):
            if unknown := [name for name in wanted if name is not None and name not in names]:
                raise ValueError(f"{field}: {unknown[0]} is no arm; must be one of {', '.join(names)}")
        if self.sweep_seed in self.seeds and any(len(arm.lr or self.lr or []) > 1 for arm in self.arms):
            raise ValueError(
                f"sweep_seed: {self.sweep_seed} is one of seeds {self.seeds}; must be another one, or the rate is "
                "chosen on the runs that are to be compared"
            )
        return self

    @model_validator(mode="after")
    def _reference_is_not_solved(self) -> Study:
        if wrong := [arm for arm in self.arms if arm.name == self.budget.of and arm.solve != "none"]:
            raise ValueError(
                f"arms: {wrong[0].name} has solve {wrong[0].solve}, but budget is a share of its FLOPs; must be none"
            )
        return self

    @model_validator(mode="after")
    def _steps_are_not_solved(self) -> Study:
        if self.budget.steps is None:
            return self
        if wrong := [arm for arm in self.arms if arm.solve == "width"]:
            raise ValueError(f"arms: {wrong[0].name} has solve width, but budget is steps; must be steps, none")
        return self

    @model_validator(mode="after")
    def _settings_are_free(self) -> Study:
        for place, arm in [("settings", None), *((f"arms.{n}.settings", arm) for n, arm in enumerate(self.arms))]:
            swept = self.lr is not None or any(one.lr for one in self.arms) if arm is None else arm.lr or self.lr
            for name, value in _dotted((arm or self).settings):
                if name in OF_THE_STUDY or (name == "optimizer.lr" and swept):
                    of = "lr" if name == "optimizer.lr" else "the study for each run"
                    raise ValueError(f"{place}.{name}: {value!r} is set by {of}; must be left out")
        return self

    @property
    def preparations(self) -> list[Preparation]:
        return self.prepare if isinstance(self.prepare, list) else []

    def baselines_of(self, arm: str) -> list[str]:
        own = next(one.baselines for one in self.arms if one.name == arm)
        return [name for name in (self.baselines if own is None else own) if name != arm]

    def paths(self, file: Path) -> list[Path]:
        return [file.parent / name for name in ([self.base] if isinstance(self.base, str) else self.base)]

    def config(self, arm: Arm, file: Path) -> RunConfig:
        """The configuration of an arm as it stands in the files. Raises ConfigError that names the arm."""
        words = [f"{name}={json.dumps(value)}" for one in (self, arm) for name, value in _dotted(one.settings)]
        with named(arm.name):
            return load_config(self.paths(file), words)

    def rates(self, arm: Arm, config: RunConfig) -> list[float]:
        return sorted(set(arm.lr or self.lr or [config.optimizer.lr]))


@contextlib.contextmanager
def named(arm: str) -> Iterator[None]:
    """Puts the name of an arm before the message of a ConfigError inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"arm {arm}: {error}") from None


def load_study(path: Path) -> Study:
    """Read and check. Raises ConfigError naming the field, its value and what it must be."""
    if not path.is_file():
        raise ConfigError(f"--study: no such file: {path}")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--study: {path}: not readable as YAML: {error}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"--study: {path}: must hold settings such as `arms:`")
    # A value that names another setting of its run is left to the run.
    plain = OmegaConf.to_container(content, resolve=False)
    assert isinstance(plain, dict)
    return check_values(Study, {str(name): value for name, value in plain.items()})


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and plain values of nested settings."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
