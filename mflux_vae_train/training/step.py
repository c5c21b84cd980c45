"""One optimizer update: accumulate micro-batches, sum over processes, clip, update. It knows no image or prompt.

Gradients and update are pure functions of arrays, which `mx.compile` may fuse. No global random state is
read: whatever is random comes inside the micro-batch, as keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_reduce, tree_unflatten

from mflux_vae.errors import TrainingError
from mflux_vae.runtime.device import eval_each, is_cpu
from mflux_vae_train.checkpointing.state import buffer_tree
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.optimizers.base import Optimizer
from mflux_vae_train.optimizers.parallel_map import parallel_tree_map
from mflux_vae_train.training.ema import EMA

Arrays: TypeAlias = Mapping[str, Any]
"""A tree of arrays: each value is an array or another such mapping."""

SAMPLES = "samples"

Loss: TypeAlias = Callable[[nn.Module, Arrays], tuple[mx.array, Mapping[str, mx.array]]]
"""(model, arrays of a micro-batch) -> (scalar mean over its samples, scalar metrics, averaged in the same way)."""


@runtime_checkable
class HasGradients(Protocol):
    """A loss that has a faster way to its gradients on a CPU than tracing (see `tape`)."""

    def gradients(
        self, model: Any, arrays: Arrays, scale: mx.array
    ) -> tuple[tuple[mx.array, Mapping[str, mx.array]], Any] | None:
        """As `Loss` answers, and the trainable parameters' gradients, times `scale`; None if there is no such way."""


Pass: TypeAlias = Callable[[], tuple[Any, Any]]
"""A micro-batch forward and backward: (loss, (metrics, buffers)) and gradients, described when it is called."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass sees.

    Attributes:
        arrays: inputs of the loss, random keys included.
        weight: number of samples that the loss is the mean of. Within an update micro-batches count by
            weight, so that four of one sample give the gradient of one of four, and a smaller last one is
            averaged right, whichever processes they fall to.
    """

    arrays: Arrays
    weight: float


def sequential(passes: Iterable[Pass]) -> Iterator[tuple[Any, Any]]:
    """What passes answer, not computed yet: who asks for the next one before that has all their activations at once."""
    return (described() for described in passes)


class Step:
    """Updates the trainable parameters of `model`, the optimizer's state and the moving average.

    Args:
        model: its trainable parameters are fixed here; freeze first. All other arrays count as constants, but see
            `buffers`.
        optimizer: any `mlx.optimizers` one; its learning rate is set for each update.
        loss: see `Loss`.
        max_grad_norm: gradients are scaled down to this global norm.
        ema: moving average to keep along.
        buffers: whether a forward pass may replace the arrays that are not for training, frozen or not, as batch
            normalisation does with its running statistics. Each micro-batch of an update
            begins with the same ones, and what they become is averaged by weight: the same for any number of processes.
        compile: None decides: yes on Metal and CUDA, no on a CPU, where `mx.compile` calls a C++ compiler for every new
            kernel: a quarter of a minute for an adapter's step, once on each machine, whose later updates take a
            sixth less time.
        run_passes: how those of an update are computed: in their order, one at a time, or several.
        processes: the processes that make every update together, each from its share of the micro-batches.
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
        compile: bool | None = None,
        run_passes: Callable[[Iterable[Pass]], Iterator[tuple[Any, Any]]] = sequential,
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self.model, self.optimizer, self.ema, self.max_grad_norm = model, optimizer, ema, max_grad_norm
        self.processes, self._run_passes = processes, run_passes
        if not tree_flatten(model.trainable_parameters()):
            raise TrainingError("nothing to train: the model has no trainable parameters")
        # a host may hold transposed views, which resuming replaces: copies round alike (see `mflux_vae.weights`)
        model.update(tree_map(mx.contiguous, model.trainable_parameters()))
        optimizer.init(model.trainable_parameters())
        for single in getattr(optimizer, "optimizers", [optimizer]):
            single.consumes = True  # nobody asks for gradients after an update
        # Arrays that were never evaluated would be computed again in every compiled call.
        eval_each([model.parameters(), optimizer.state])

        def objective(parameters: Any, kept: Any, arrays: Arrays, weight: mx.array) -> tuple[mx.array, Any]:
            model.update(parameters)
            model.update(kept)
            value, metrics = loss(model, arrays)
            # `mx.compile` fails where two results are the same formula, as a loss and its only part: these never are
            weighted: Any = mx.stack([*metrics.values()]) * weight if metrics else []
            return value * weight, (dict(zip(metrics, weighted, strict=True)), self._buffers())

        def apply(parameters: Any, gradients: Any, norm: mx.array, total: mx.array) -> tuple[Any, mx.array]:
            scale = mx.minimum(max_grad_norm / (norm + 1e-6), 1.0) / total
            gradients = parallel_tree_map(lambda g: g * scale.astype(g.dtype), gradients, consumed=True)
            before = exact(parameters)
            changed = optimizer.apply_gradients(gradients, parameters)
            if ema is not None:
                ema.update(exact(changed))
            change = parallel_tree_map(lambda new, old: _sum_of_squares(new - old), exact(changed), before)
            return changed, _root_of_sum(change) / mx.maximum(global_norm(parameters), 1e-20)

        def exact(parameters: Any) -> Any:
            """Float32: what the optimizer keeps of weights in half precision, which small updates leave as they are."""
            kept = optimizer.exact(parameters) if isinstance(optimizer, Optimizer) else parameters
            return tree_map(lambda weights: weights.astype(mx.float32), kept)

        traced = mx.value_and_grad(objective)

        def taped(parameters: Any, kept: Any, arrays: Arrays, weight: mx.array) -> tuple[Any, Any]:
            answer = loss.gradients(model, arrays, weight) if isinstance(loss, HasGradients) else None
            if answer is None:
                return traced(parameters, kept, arrays, weight)
            (value, metrics), gradients = answer
            metrics = {name: metric * weight for name, metric in metrics.items()}
            return (value * weight, (metrics, self._buffers())), gradients

        self._buffers: Callable[[], Any] = partial(_arrays, model, _never_trained(model)) if buffers else dict
        self._gradients, self._apply = taped if is_cpu() else traced, apply
        if not is_cpu() if compile is None else compile:
            self._gradients = mx.compile(traced)
            if not is_cpu():  # fused on a CPU, scalars such as the bias correction are computed for every element
                state = [optimizer.state, *([ema.state] if ema is not None else [])]
                self._apply = mx.compile(apply, inputs=state, outputs=state)

    def __call__(self, update: int, batches: Sequence[MicroBatch], learning_rate: float) -> dict[str, float]:
        """Make update number `update` (0-based, for messages) from all of `batches`, and those of other processes.

        Returns:
            `loss`, `grad_norm` (before clipping), `update_size` (norm of what the update changed, as a share of the
            norm of all that trains), `learning_rate`, what the optimizer has `measured`, `samples` (in all processes)
            and the loss's own metrics.

        Raises:
            TrainingError: loss or gradients are not finite; parameters are then as they were before.
        """
        # accumulate: sums over the samples of all micro-batches, here and in other processes
        parameters, before = self.model.trainable_parameters(), self._buffers()
        loss = mx.array(0.0)
        metrics: dict[str, mx.array] = {}
        sums = [] if batches else [tree_map(mx.zeros_like, tree) for tree in (parameters, before)]

        def differentiated(batch: MicroBatch) -> tuple[Any, Any]:
            try:
                return self._gradients(parameters, before, batch.arrays, mx.array(batch.weight, mx.float32))
            finally:  # differentiation and tracing leave their placeholders in the module
                self.model.update(parameters)
                self.model.update(before)

        answers = self._run_passes(partial(differentiated, batch) for batch in batches)
        for batch, ((part, (measured, kept)), slope) in zip(batches, answers, strict=True):
            weight = batch.weight
            loss = loss + part
            metrics = {name: metrics.get(name, 0.0) + value for name, value in measured.items()}
            new = [slope, tree_map(lambda now, then, weight=weight: (now - then) * weight, kept, before)]
            sums = [tree_map(mx.add, *pair) for pair in zip(sums, new, strict=True)] if sums else new
            del slope, kept, new
            mx.eval(loss, metrics, sums)  # frees this micro-batch's activations
        gradients, moved = self.processes.all_reduce_trees(sums)
        totals = self.processes.all_reduce(
            {SAMPLES: sum(batch.weight for batch in batches)}
            | {name: float(value) for name, value in {"loss": loss, **metrics}.items()}
        )
        if not (samples := totals.pop(SAMPLES)):
            raise ValueError(f"update {update + 1} has no micro-batches")
        averages = {name: total / samples for name, total in totals.items()}

        # check: once per update, before anything is changed
        norm = global_norm(gradients) / samples
        measured_loss, measured_norm = averages.pop("loss"), float(norm)
        if not (math.isfinite(measured_loss) and math.isfinite(measured_norm)):
            raise TrainingError(
                f"update {update + 1}: loss is {measured_loss:g} and the gradients' norm {measured_norm:g}; "
                "lower --learning_rate, or look for a broken picture"
            )

        # clip and update
        self.optimizer.learning_rate = learning_rate
        parameters, size = self._apply(parameters, gradients, norm, mx.array(samples, mx.float32))
        self.model.update(parameters)
        self.model.update(tree_map(lambda then, change: then + (change / samples).astype(then.dtype), before, moved))
        mx.eval(parameters, size, self.optimizer.state, self.ema.state if self.ema is not None else [])
        return {
            "loss": measured_loss,
            "grad_norm": measured_norm,
            "update_size": float(size),
            "learning_rate": learning_rate,
            **getattr(self.optimizer, "measured", dict)(),
            SAMPLES: samples,
            **averages,
        }


def _never_trained(model: nn.Module) -> list[str]:
    """Names of the arrays that even an unfrozen model does not train."""
    frozen = [(part, set(part._no_grad)) for part in model.modules()]
    for part, _ in frozen:  # one by one, as modules have their own say
        part.unfreeze(recurse=False)
    names = list(dict(tree_flatten(buffer_tree(model))))
    for part, own in frozen:
        part._no_grad = own
    return names


def _arrays(model: nn.Module, names: Sequence[str]) -> Any:
    """Those of a model, as a tree."""
    flat = dict(tree_flatten(model.parameters()))
    return tree_unflatten([(name, flat[name]) for name in names]) if names else {}


def global_norm(tree: Any) -> mx.array:
    """Euclidean norm over all arrays of a tree, summed in float32."""
    return _root_of_sum(parallel_tree_map(_sum_of_squares, tree))


def _root_of_sum(squares: Any) -> mx.array:
    return mx.sqrt(tree_reduce(mx.add, squares, mx.array(0.0)))


def _sum_of_squares(x: mx.array) -> mx.array:
    """On a CPU a product of x with itself: one pass over memory."""
    flat = x.astype(mx.float32).reshape(1, -1)
    return (flat @ flat.T)[0, 0] if is_cpu() else mx.square(flat).sum()
