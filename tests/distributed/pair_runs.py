"""Checkpoints of every layout in every phase, and every layout that goes on from each; runs on every rank."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine_runs import Layout, build, check_state, collected_state, divided, make_batches, run_config, train_step

from megasparse.parallel import Mesh
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.state import TrainState

PHASES = {"warm_up": 5, "ultra_sparse": 10, "restoration": 16}
"""Steps before the checkpoint, by the phase in which the run stands then."""
STEPS_AFTER = 2


def digest_of(mesh: Mesh, engine, controller) -> str:
    """Of every weight, moment and mask, put together from all ranks."""
    found = hashlib.sha256()
    for tensors in collected_state(mesh, engine).values():
        for name, tensor in tensors.items():
            found.update(name.encode() + tensor.numpy().tobytes())
    for name, bits in controller.state().items():
        found.update(name.encode() + bits.numpy().tobytes())
    return found.hexdigest()


def save_all(mesh: Mesh, layouts: list[Layout], overrides: list[str], folder: Path) -> dict[str, dict[str, list]]:
    """By layout and phase: digest of what was saved, and losses of the next steps."""
    results = {}
    for layout in layouts:
        own, config = divided(mesh, layout.tensor), run_config(overrides, layout)
        engine, controller = build(own, config)
        batches, losses, found = make_batches(config), [], {}
        for step in range(max(PHASES.values()) + STEPS_AFTER):
            for phase, stop in PHASES.items():
                if step == stop:
                    (folder / str(layout)).mkdir(parents=True, exist_ok=True)
                    checkpointer = Checkpointer(folder / str(layout) / phase, config, own, engine, engine.rules)
                    checkpointer.save(TrainState(step=stop))
                    checkpointer.finish()
                    found[phase] = digest_of(own, engine, controller)
            losses.append(float(train_step(own, engine, controller, step, batches[step])["loss"]))
        results[str(layout)] = {p: [found[p], losses[stop : stop + STEPS_AFTER]] for p, stop in PHASES.items()}
    return results


def resume_all(
    mesh: Mesh, layouts: list[Layout], sources: list[tuple[str, str]], overrides: list[str], folder: Path
) -> dict[str, list]:
    """By `source phase target`: digest of what was restored, losses of the next steps."""
    results = {}
    for layout in layouts:
        own, config = divided(mesh, layout.tensor), run_config(overrides, layout)
        other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})})
        batches = make_batches(config)
        engine, controller = build(own, other)
        engine.config = controller.config = config
        for source, phase in sources:
            state = Checkpointer(folder / source / phase, config, own, engine, engine.rules).restore().state
            assert state is not None and state.step == PHASES[phase]
            check_state(engine, controller)
            found = digest_of(own, engine, controller)
            losses = [
                float(train_step(own, engine, controller, step, batches[step])["loss"])
                for step in range(state.step, state.step + STEPS_AFTER)
            ]
            results[f"{source} {phase} {layout}"] = [found, losses]
    return results
