"""Mixed Sparsity Training written down plainly: one process, float32, sorts over whole tensors, AdamW by its formula.

    result = PlainTraining(config, batches).run()

It shares the dense forward pass with the product, and nothing of what is tested: schedule, masks, scores, growth,
random numbers, clipping, optimizer and learning rates are written a second time, from the description of the method.
With `balance_shards` tensor-parallel ranks decide for themselves: ``shard_units`` says which units are whose.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from next_token import next_token_loss
from plain_selection import best, hashed
from torch import Tensor

from megasparse.config.schema import RunConfig
from megasparse.layers import LayerFactory
from megasparse.models.gpt import GPT

TIE_STREAM, GROWTH_STREAM = 1, 2


class PlainTraining:
    """State of the reference: a dense model, one full-size bool mask per sparse matrix, moments by parameter name."""

    def __init__(self, config: RunConfig, batches: list[Tensor], balanced_shards: int = 1) -> None:
        """balanced_shards: tensor-parallel ranks that each keep their own equal share of every matrix's units."""
        self.config, self.batches, self.balanced_shards = config, batches, balanced_shards
        self.model = GPT(config.model, config.attention, config.model.vocab_size, LayerFactory(seed=config.run.seed))
        self.weights = dict(self.model.named_parameters())
        # Parameter name by sparse layer; the tied head's weight is the token table.
        self.layers = {
            name.removesuffix(".weight"): name
            for name, p in self.weights.items()
            if name.startswith("layers.") and p.ndim == 2
        }
        if config.sparsity.head:
            self.layers["head"] = "embedding.tokens.weight"
        zeros = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        self.first, self.second = zeros, {name: t.clone() for name, t in zeros.items()}
        self.age = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        self.masks = {name: torch.ones_like(self.weights[p], dtype=torch.bool) for name, p in self.layers.items()}
        self.updates = 0
        self.margin = math.inf
        """Smallest relative distance between the last chosen and the first refused score, over all decisions."""

    def run(self) -> dict:
        losses, norms, masks = [], [], []
        for step, batch in enumerate(self.batches):
            loss, norm = self.train_step(step, batch)
            losses.append(loss)
            norms.append(norm)
            masks.append({name: mask.clone() for name, mask in self.masks.items()})
        return {
            "margin": self.margin,
            "losses": torch.tensor(losses, dtype=torch.float64),
            "norms": torch.tensor(norms, dtype=torch.float64),
            "masks": masks,
            "weights": {name: p.detach().clone() for name, p in self.weights.items()},
            "exp_avg": self.first,
            "exp_avg_sq": self.second,
        }

    def train_step(self, step: int, batch: Tensor) -> tuple[float, float]:
        loss = next_token_loss(self.model, batch[:, :-1], batch[:, 1:])
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.weights.items()}
        sparsity, changed = self.config.sparsity, False
        for layer, parameter in self.layers.items():
            if step > 0 and step % sparsity.update_interval == 0:
                changed |= self.evolve(step, layer, parameter, gradients[parameter])
            gradients[parameter][~self.masks[layer]] = 0
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        shrink = min(1.0, self.config.optimizer.gradient_clipping / (norm + 1e-6))
        if not (changed and sparsity.skip_optimizer_on_update):
            self.updates += 1
            for name, gradient in gradients.items():
                self.adamw(name, gradient * shrink)
        return float(loss.detach()), norm

    def target_density(self, step: int) -> float:
        s, u = self.config.sparsity, step / self.config.train.steps
        if u < s.warmup_end:
            return 1 - (1 - s.density) * (1 - (1 - u / s.warmup_end) ** 3)
        if u < s.restoration_start:
            return s.density
        if u < s.restoration_end:
            return s.density + (1 - s.density) * (u - s.restoration_start) / (s.restoration_end - s.restoration_start)
        return 1.0

    @torch.no_grad()
    def evolve(self, step: int, layer: str, parameter: str, gradient: Tensor) -> bool:
        """One topology update of one matrix; whether anything could change."""
        sparsity, weight = self.config.sparsity, self.weights[parameter]
        active = self.units(self.masks[layer].float()) > 0
        target = min(active.size, max(1, math.floor(self.target_density(step) * active.size + 0.5)))
        zeta = 0.3 / 2 * (1 + math.cos(math.pi * step / self.config.train.steps))
        ratio, parts = sparsity.growth_ratio, []
        share = {"mixed": ratio / (ratio + 1), "random": 0.0, "gradient": 1.0}[sparsity.growth or "mixed"]
        for rank, units in enumerate(self.shard_units(layer, weight)):
            wanted = target // self.balanced_shards + (rank < target % self.balanced_shards)
            num_active = int(active[units].sum())
            drop = 0 if wanted == len(units) else math.floor(zeta * num_active)
            drop = max(drop, num_active - wanted)
            grow = wanted - (num_active - drop)
            parts.append((units, num_active - drop, grow, math.floor(share * grow + 0.5)))
        if all(grow == 0 for _, _, grow, _ in parts) and sum(keep for _, keep, _, _ in parts) == active.sum():
            return False
        score = weight.abs()
        if sparsity.drop_score == "magnitude_gradient":
            score = score + sparsity.drop_score_lambda * gradient.abs()
        elif all(by_gradient == 0 for *_, by_gradient in parts):
            # Nothing asks for the dense gradient, so units that come to life have none in this step.
            gradient[~self.masks[layer]] = 0
        key = (self.config.run.seed, step, zlib.crc32(layer.encode()))
        drop_score, growth_score = self.units(score), self.units(gradient)
        kept, grown = np.zeros_like(active), np.zeros_like(active)
        for units, keep, grow, by_gradient in parts:
            tie = hashed(units, *key, TIE_STREAM)
            kept[units] = self.best_with_margin(drop_score[units], tie, active[units], keep)
            chosen = self.best_with_margin(growth_score[units], tie, ~kept[units], by_gradient)
            chance = (hashed(units, *key, GROWTH_STREAM) >> np.uint32(8)).astype(np.float32) / 2**24
            grown[units] = chosen | best(chance, tie, ~(kept[units] | chosen), grow - by_gradient)
        self.masks[layer] = self.expanded(kept | grown, weight)
        gone = ~self.expanded(kept | (grown & active) if sparsity.regrown == "keep" else kept, weight)
        for tensor in (weight, self.first[parameter], self.second[parameter], self.age[parameter]):
            tensor[gone] = 0
        return True

    def shard_units(self, layer: str, weight: Tensor) -> list[np.ndarray]:
        """Numbers of the units that decide together: all of them, or with balanced shards those of each rank.

        A rank has its share of the columns of what leads back into the residual stream; of everything else its share
        of the rows: of queries, keys and values each, and of both halves of a gated MLP.
        """
        b = self.config.sparsity.block_size
        rows, columns = (width // b for width in weight.shape)
        numbers = np.arange(rows * columns).reshape(rows, columns)
        if layer.endswith((".output", ".down")):
            return [part.reshape(-1) for part in np.split(numbers, self.balanced_shards, axis=1)]
        model, fused = self.config.model, [rows]
        if layer.endswith(".qkv"):
            key_value = model.key_value_heads * model.head_dim // b
            fused = [rows - 2 * key_value, key_value, key_value]
        elif layer.endswith(".gate_up"):
            fused = [rows // 2, rows // 2]
        halves = [
            np.split(part, self.balanced_shards) for part in np.split(numbers, np.cumsum(fused)[:-1].tolist(), axis=0)
        ]
        return [np.concatenate([part[rank] for part in halves]).reshape(-1) for rank in range(self.balanced_shards)]

    def best_with_margin(self, score: np.ndarray, tie: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
        chosen = best(score, tie, allowed, count)
        refused = allowed & ~chosen
        if chosen.any() and refused.any() and score[chosen].min() > 0:
            self.margin = min(self.margin, float(1 - score[refused].max() / score[chosen].min()))
        return chosen

    def units(self, values: Tensor) -> np.ndarray:
        """Frobenius norms of the blocks of a matrix, flat float32 (absolute values where a unit is one weight)."""
        b = self.config.sparsity.block_size
        if b == 1:
            return values.abs().numpy().reshape(-1)
        rows, columns = values.shape
        blocks = values.double().reshape(rows // b, b, columns // b, b)
        return blocks.square().sum(dim=(1, 3)).sqrt().float().numpy().reshape(-1)

    def expanded(self, units: np.ndarray, weight: Tensor) -> Tensor:
        b = self.config.sparsity.block_size
        grid = torch.from_numpy(units).view(weight.shape[0] // b, weight.shape[1] // b)
        return torch.kron(grid, torch.ones(b, b, dtype=torch.bool))

    @torch.no_grad()
    def adamw(self, name: str, gradient: Tensor) -> None:
        o, sparsity, weight = self.config.optimizer, self.config.sparsity, self.weights[name]
        lr, decay = o.lr, o.weight_decay if weight.ndim == 2 else 0.0
        layer = next((layer for layer, parameter in self.layers.items() if parameter == name), None)
        if layer is not None:
            density = float(self.masks[layer].double().mean())
            multiplier = min(density**-sparsity.lr_density_power, sparsity.lr_density_cap)
            lr, decay = lr * multiplier, decay / multiplier
        first, second, age = self.first[name], self.second[name], self.age[name]
        age += 1
        first.mul_(o.beta1).add_(gradient, alpha=1 - o.beta1)
        second.mul_(o.beta2).add_(gradient.square(), alpha=1 - o.beta2)
        by_age = sparsity.per_weight_step_counts and layer is not None
        count = age.double() if by_age else torch.tensor(self.updates, dtype=torch.float64)
        corrected = (second.double() / (1 - o.beta2**count)).sqrt() + o.epsilon
        update = first.double() / (1 - o.beta1**count) / corrected
        if sparsity.regrowth_warmup_steps and layer is not None:
            ramp = (age / sparsity.regrowth_warmup_steps).clamp(max=1).double()
            update = torch.where(age < self.updates, update * ramp, update)
        weight.mul_(1 - lr * decay).sub_((lr * update).float())
