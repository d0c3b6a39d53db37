"""The sections of the check, in the order of what is worth most if time runs out.

The module of a section has a function ``run(context)``, which is called in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    seconds: int
    """Time limit where the whole check may take `MINUTES`; it scales with `--minutes`."""
    decides: bool = False
    """Its numbers are right or wrong, and decide the exit status."""
    kernels_only: bool = True
    """Imports torch and Triton and nothing of DeepSpeed, pydantic or OmegaConf."""
    uses: tuple[str, ...] = field(default=())
    """Earlier sections whose rows it reads where they are there."""

    @property
    def module(self) -> str:
        return f"megasparse.gpu_check.{self.name}"


MINUTES = 9
SECTIONS = (
    Section("facts", "the machine and its ceilings", 50),
    Section("compiling", "compiling the Triton kernels ahead, in parallel", 110),
    Section("numerics", "every kernel against float64", 100, decides=True),
    Section("components", "loss, optimizer and topology: GPU against CPU", 40, decides=True, kernels_only=False),
    Section("products", "block-sparse products: device and host time", 90, uses=("facts",)),
    Section("attention", "attention patterns against flash and cuDNN", 60),
    Section("training", "training at ZeRO 0 to 3: GPU against CPU, resume", 100, kernels_only=False),
    Section("step", "a training step: wall, kernels, synchronisations, memory", 90, kernels_only=False),
    Section("tuning", "break-even densities and lengths", 90, kernels_only=False),
)


def choose(words: str | None) -> tuple[Section, ...]:
    """The sections named in `a,b`, in their order; None: all. Raises ValueError for an unknown name."""
    if words is None:
        return SECTIONS
    names, known = words.split(","), {section.name for section in SECTIONS}
    for name in names:
        if name not in known:
            raise ValueError(f"--sections: {name!r} is unknown; must be of {', '.join(s.name for s in SECTIONS)}")
    return tuple(section for section in SECTIONS if section.name in names)
