"""One optimizer update: accumulate micro-batches, sum over processes, clip, update.

Gradients and update are pure functions of arrays, which `mx.compile` may fuse. No global random state is read:
micro-batches contain random keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mflux_vae.errors import DeviceError, TrainingError
from mflux_vae.kernels.cpu.compile import compile as compiled
from mflux_vae.runtime.device import eval_each
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.runtime.threads import exclusive
from mflux_vae_train.checkpointing import state
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.optimizers.base import masters, scaled_update, sum_of_squares, widened
from mflux_vae_train.training.ema import EMA

Arrays: TypeAlias = Mapping[str, Any]
"""A tree of arrays: each value is an array or another such mapping."""

SAMPLES = "samples"

Loss: TypeAlias = Callable[[nn.Module, Arrays], tuple[mx.array, Mapping[str, mx.array]]]
"""(model, arrays of a micro-batch) -> (scalar mean over its samples, scalar metrics, averaged in the same way)."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The input of one forward and backward pass.

    Attributes:
        arrays: inputs of the loss, including random keys.
        weight: number of samples that the loss averages over. An update averages its micro-batches by weight: four of
            one sample give the gradient of one of four, on any number of processes.
    """

    arrays: Arrays
    weight: float


class UpdateFailed(DeviceError):
    """The device failed while parameters and optimizer state were replaced: those before the update are lost."""


class Step:
    """Updates the trainable parameters of `model`, the optimizer's state and the moving average.

    Args:
        model: the set of trainable parameters is fixed here; freeze first. Other arrays are constants, except for
            `buffers`.
        optimizer: any of `mlx.optimizers`; its learning rate is set for each update.
        loss: see `Loss`.
        max_grad_norm: gradients are scaled down to this global norm.
        ema: moving average to update.
        buffers: whether a forward pass may replace arrays that are never trained, such as the running statistics of
            batch normalization. All micro-batches of an update start from the same buffers, and the results are
            averaged by weight: equal for any number of processes.
        compile: trace forward pass, gradients and update once for each set of shapes.
        processes: each computes its share of the micro-batches of every update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        loss: Loss,
        *,
        max_grad_norm: float = 1.0,
        ema: EMA | None = None,
        buffers: bool = False,
        compile: bool = True,
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self.model, self.optimizer, self.ema, self.max_grad_norm = model, optimizer, ema, max_grad_norm
        self.processes = processes
        if not tree_flatten(model.trainable_parameters()):
            raise TrainingError("nothing to train: the model has no trainable parameters")
        # a host may hold transposed views, which resuming replaces: copies round alike (see `mflux_vae.weights`)
        model.update(tree_map(mx.contiguous, model.trainable_parameters()))
        optimizer.init(model.trainable_parameters())
        self._state = {
            "parameters": state.parameters(model),
            "optimizer": state.tree_state(optimizer.state),
            "buffers": state.Stateful(read=lambda: self._buffers(), write=model.update),
        }
        if ema is not None:
            self._state["average"] = state.tree_state(ema.state)
        self._holds_state = 2 * _bytes(model.trainable_parameters()) <= _bytes(model.parameters())
        # unevaluated arrays would be computed again in every compiled call
        with exclusive():
            eval_each([model.parameters(), optimizer.state])

        def objective(parameters: Any, buffers: Any, arrays: Arrays, weight: mx.array) -> tuple[mx.array, Any]:
            model.update(parameters)
            model.update(buffers)
            value, metrics = loss(model, arrays)
            # `mx.compile` fails if two results are the same expression, as a loss and its only metric; hence the stack
            weighted: Any = mx.stack([*metrics.values()]) * weight if metrics else []
            return value * weight, (dict(zip(metrics, weighted, strict=True)), self._buffers())

        def apply(parameters: Any, gradients: Any, norm: mx.array, total: mx.array) -> tuple[Any, mx.array]:
            scale = mx.minimum(max_grad_norm / (norm + 1e-6), 1.0) / total
            updated = scaled_update(optimizer, gradients, parameters, scale)
            if ema is not None:
                ema.update(masters(optimizer, updated.parameters))
            return updated.parameters, mx.sqrt(updated.change) / mx.maximum(mx.sqrt(updated.before), 1e-20)

        traced = mx.value_and_grad(objective)

        self._buffers: Callable[[], Any] = partial(_arrays, model, _never_trained(model)) if buffers else dict
        self._gradients, self._apply = traced, apply
        if compile:
            captured = [optimizer.state, *([ema.state] if ema is not None else [])]
            self._gradients = compiled(traced)
            self._apply = compiled(apply, inputs=captured, outputs=captured)

    def __call__(self, update: int, batches: Sequence[MicroBatch], learning_rate: float) -> dict[str, float]:
        """Make update `update` (0-based, for messages) from `batches` and those of the other processes.

        Returns:
            `loss`, `grad_norm` (before clipping), `update_size` (norm of the change relative to the norm of the
            trainable parameters), `learning_rate`, the optimizer's own metrics, `samples` (in all processes) and the
            metrics of the loss.

        Raises:
            TrainingError: loss or gradients are not finite; the parameters are unchanged.
            UpdateFailed: the device failed, and the parameters are lost. After other errors of it they are unchanged.
        """
        sums, metrics = self._accumulate(batches)
        # other threads may compute while this one waits for other processes
        gradients, changes = self.processes.all_reduce_trees(sums)
        totals = self.processes.all_reduce({SAMPLES: sum(batch.weight for batch in batches)} | metrics)
        if not (samples := totals.pop(SAMPLES)):
            raise ValueError(f"update {update + 1} has no micro-batches")
        averages = {name: total / samples for name, total in totals.items()}
        return self._change(update, gradients, changes, samples, averages, learning_rate)

    @exclusive()
    def _accumulate(self, batches: Sequence[MicroBatch]) -> tuple[list[Any], dict[str, float]]:
        """Sums over the samples of these micro-batches: [gradients, changes of buffers], and `loss` with metrics."""
        parameters, before = self.model.trainable_parameters(), self._buffers()
        loss = mx.array(0.0)
        metrics: dict[str, mx.array] = {}
        # sums of bfloat16 gradients would have 8 bits
        as_summed = widened if len(batches) > 1 or self.processes.size > 1 else _unchanged
        zeros = [tree_map(lambda array: mx.zeros_like(as_summed(array)), tree) for tree in (parameters, before)]
        sums = [] if batches else zeros

        for batch in batches:
            (value, (parts, buffers)), gradients = self._differentiate(batch, parameters, before)
            weight = batch.weight
            loss = loss + value
            metrics = {name: metrics.get(name, 0.0) + part for name, part in parts.items()}
            new = [gradients, tree_map(lambda now, then, weight=weight: (now - then) * weight, buffers, before)]
            new = tree_map(as_summed, new)
            sums = [tree_map(mx.add, *pair) for pair in zip(sums, new, strict=True)] if sums else new
            del gradients, buffers, new
            mx.eval(loss, metrics, sums)  # frees the activations of this micro-batch
        return sums, {name: float(value) for name, value in {"loss": loss, **metrics}.items()}

    def _differentiate(self, batch: MicroBatch, parameters: Any, buffers: Any) -> tuple[Any, Any]:
        try:
            return self._gradients(parameters, buffers, batch.arrays, mx.array(batch.weight, mx.float32))
        finally:  # differentiation leaves placeholders in the module
            self.model.update(parameters)
            self.model.update(buffers)

    @exclusive()
    def _change(
        self,
        update: int,
        gradients: Any,
        changes: Any,
        samples: float,
        averages: dict[str, float],
        learning_rate: float,
    ) -> dict[str, float]:
        """Check the sums over all processes, clip and update; the metrics of the update."""
        norm = global_norm(gradients) / samples
        mean_loss, grad_norm = averages.pop("loss"), float(norm)
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            weights: dict[str, mx.array] = dict(tree_flatten(self.model.parameters()))
            broken = [path for path, one in weights.items() if not mx.all(mx.isfinite(one))]
            fix = "lower --learning_rate, or look for a broken image"
            if broken:
                fix = f"{len(broken)} weights have NaN or infinite values, first {broken[0]}: take another file"
            raise TrainingError(f"update {update + 1}: loss is {mean_loss:g}, gradient norm {grad_norm:g}; {fix}")
        parameters, before = self.model.trainable_parameters(), self._buffers()
        with self._unchanged_on_failure():
            self.optimizer.learning_rate = learning_rate
            parameters, size = self._apply(parameters, gradients, norm, mx.array(samples, mx.float32))
            self.model.update(parameters)
            after = tree_map(lambda then, change: then + (change / samples).astype(then.dtype), before, changes)
            self.model.update(after)
            mx.eval(parameters, size, after, self.optimizer.state, self.ema.state if self.ema is not None else [])
        return {
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "update_size": float(size),
            "learning_rate": learning_rate,
            **getattr(self.optimizer, "metrics", dict)(),
            SAMPLES: samples,
            **averages,
        }

    @contextmanager
    def _unchanged_on_failure(self) -> Iterator[None]:
        """Restore parameters, buffers, optimizer state and averages if the device fails in the block.

        Arrays that are held for this cannot be donated to the update. An adapter's are small beside the frozen weights.

        Raises:
            UpdateFailed: there are too many trained weights to hold.
        """
        held = state.flatten(self._state) if self._holds_state else None
        try:
            with device_errors():
                yield
        except DeviceError as error:
            if held is None:
                raise UpdateFailed(**error.parts, memory=error.memory) from error
            state.restore(self._state, *held, where="state before the update")
            raise


def _never_trained(model: nn.Module) -> list[str]:
    """Names of the arrays that even an unfrozen model does not train."""
    frozen = [(part, set(part._no_grad)) for part in model.modules()]
    for part, _ in frozen:  # one by one: modules may override `unfreeze`
        part.unfreeze(recurse=False)
    names = list(dict(tree_flatten(state.buffer_tree(model))))
    for part, names_before in frozen:
        part._no_grad = names_before
    return names


def _arrays(model: nn.Module, names: Sequence[str]) -> Any:
    """Arrays of a model by name, as a tree."""
    flat = dict(tree_flatten(model.parameters()))
    return tree_unflatten([(name, flat[name]) for name in names]) if names else {}


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(tree)).values())


def _unchanged(array: mx.array) -> mx.array:
    return array


def global_norm(tree: Any) -> mx.array:
    """Euclidean norm over all arrays of a tree, summed in float32."""
    return mx.sqrt(sum_of_squares(tree))
