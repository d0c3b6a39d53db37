"""The section `distillation`: what a model is taught by another one, besides the next token."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megasparse.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, Section


class DistillationConfig(Section):
    teacher: str | None = None
    """Model folder (tools/convert_checkpoint.py) of the teacher, with the run's vocabulary; unset: no distillation. The
    validation loss stays that of the next token, and FLOPs those of the student."""
    states: str | None = None
    """Folder of the teacher's hidden states on this run's samples (tools/teacher_states.py), which are read instead of
    computed; refused where teacher, data or order differ. Needs logits_weight 0."""
    cross_entropy_weight: NonNegativeFloat = 1.0
    """Weight of the cross entropy of the next token."""
    logits_weight: NonNegativeFloat = 0.0
    """Weight of the divergence KL(teacher || student) of the next token's distributions, times temperature^2."""
    hidden_weight: NonNegativeFloat = 1.0
    """Weight of SquareHead (Kurtic et al. 2023, arXiv 2310.06927), over the hidden states of pairs of blocks:
    mean((student - teacher)^2) / (mean(teacher^2) + epsilon)."""
    temperature: PositiveFloat = 1.0
    """Both models' logits are divided by it before the divergence is taken."""
    layer_map: list[tuple[NonNegativeInt, NonNegativeInt]] | None = None
    """Pairs [block of the student, block of the teacher] whose outputs are compared; unset: each with its own, of a
    teacher of as many blocks."""
    tokens: Literal["all", "non_padding", "response"] = "non_padding"
    """Tokens whose hidden states are compared; non_padding: all but those that fill up samples of supervised data (as
    the reference); response: those that predict a token of an answer."""
    epsilon: NonNegativeFloat = 2.0**-7
    """Added to the mean square of the teacher's hidden states; that of the reference is bfloat16's."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the pairs of blocks: their sum (the reference), or mean."""
    last_state: Literal["post_norm", "pre_norm"] = "post_norm"
    """Output of the last block: behind the norm before the head (the reference), or as the block gives it
    (SparseML)."""
    ratio_over: Literal["sample", "micro_batch"] = "sample"
    """What the two means are taken over: the tokens of a sample, so that the loss does not depend on how a step is
    divided; or those of the micro-batch of a rank (the reference). With one sample a micro-batch both are the same."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> DistillationConfig:
        weights = {name: getattr(self, name) for name in ("cross_entropy_weight", "logits_weight", "hidden_weight")}
        if self.teacher is not None and not any(weights.values()):
            raise ValueError(f"{', '.join(weights)}: all 0; must be above 0 for at least one")
        return self

    @model_validator(mode="after")
    def _states_are_of_a_teacher(self) -> DistillationConfig:
        if self.states is not None and self.teacher is None:
            raise ValueError(
                f"states: {self.states} without a teacher; must be unset, or teacher the folder they are of"
            )
        if self.states is not None and not self.hidden_weight:
            raise ValueError(f"states: {self.states} with hidden_weight 0; must be unset: nothing is read from them")
        if self.states is not None and self.logits_weight:
            raise ValueError(f"logits_weight: {self.logits_weight:g} with states; must be 0: they hold no logits")
        return self

    @model_validator(mode="after")
    def _pairs_are_named_once(self) -> DistillationConfig:
        if self.layer_map is not None and not self.layer_map:
            raise ValueError("layer_map: no pair; must be unset, or have one at least")
        pairs = self.layer_map or []
        if len({student for student, _ in pairs}) < len(pairs):
            raise ValueError(f"layer_map: {pairs} names a block of the student twice; must name each at most once")
        return self
