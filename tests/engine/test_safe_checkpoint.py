"""Checkpoint files can be read back without running code, whichever Python has written them."""

from __future__ import annotations

from enum import Enum, IntEnum

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megasparse.engine.safe_checkpoint import SafeCheckpointEngine, load_data, without_enumerations


class Stage(IntEnum):
    WEIGHTS = 3


class Old(Enum):
    """Pickled as Python 3.11.0 to 3.11.3 pickle members of all enumerations."""

    WEIGHTS = 3

    def __reduce_ex__(self, protocol: int) -> tuple:
        return getattr, (self.__class__, self._name_)


def test_members_of_enumerations_are_written_as_values(tmp_path) -> None:
    state = {"state": {"stage": Stage.WEIGHTS, "pair": [Old.WEIGHTS, 1]}, "weight": torch.ones(2)}
    SafeCheckpointEngine(TorchCheckpointEngine()).save(state, str(tmp_path / "states.pt"))
    found = torch.load(tmp_path / "states.pt", weights_only=True)
    assert found["state"] == {"stage": 3, "pair": [3, 1]} and type(found["state"]["stage"]) is int
    assert torch.equal(found["weight"], torch.ones(2))
    assert state["state"]["pair"] == [Old.WEIGHTS, 1], "the caller's state stays as it is"


def test_states_without_them_are_not_copied() -> None:
    state = {"a": {"b": [1, torch.ones(1)]}, "c": (2, "d")}
    assert without_enumerations(state) is state


def test_what_would_run_code_is_refused(tmp_path) -> None:
    torch.save({"stage": Old.WEIGHTS}, tmp_path / "states.pt")
    with pytest.raises(ValueError, match="states.pt: not a readable checkpoint file"):
        load_data(tmp_path / "states.pt")
