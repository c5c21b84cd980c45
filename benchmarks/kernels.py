"""Operations of `mflux_vae.kernels` against torch, forward, and forward and backward.

    python -m benchmarks.kernels [--only "conv 3x3"] [--quick]

`plain` is the ratio without the native extension (MFLUX_VAE_NATIVE=0). torch runs eagerly, images in both memory
layouts; the peer of quantized products multiplies by dense weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.harness.backends import mlx_work, torch_device, torch_work
from benchmarks.harness.cli import Options, main
from benchmarks.harness.process import Reused
from benchmarks.harness.rows import Implementation, Result, Row, Work
from benchmarks.harness.table import duration, ratio
from benchmarks.harness.weights import noise

GROUPS, EPS, GROUP_SIZE = 16, 1e-5, 64
PLAIN = "plain MLX"
LEAVES = 200


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation on arrays with these shapes.

    Attributes:
        kind: key of `_our_functions` and `_torch_functions`.
        inputs: shapes by name; images are NHWC, kernels (O, kh, kw, C).
        options: of `kind`.
        images: whether torch's memory layout matters.
    """

    kind: str
    inputs: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    images: bool = False


def _conv(
    batch: int, side: int, channels: int, out: int, kernel: int = 3, kind: str = "conv2d", **options: int
) -> Operation:
    x, weight = (batch, side, side, channels), (out, kernel, kernel, channels)
    norm = {"scale": (channels,), "shift": (channels,)} if kind == "norm_silu_conv2d" else {}
    given = {"x": x, **norm, "weight": weight, "bias": (out,)}
    options = options or {"padding": kernel // 2}
    return Operation(kind=kind, inputs=given, options=options, images=True)


def _norm(kind: str, *shape: int, images: bool = False, shift: bool = True) -> Operation:
    given = {"x": shape, "scale": shape[-1:]} | ({"shift": shape[-1:]} if shift else {})
    return Operation(kind=kind, inputs=given, images=images)


def _attention(*shape: int) -> Operation:
    return Operation(kind="attention", inputs=dict.fromkeys("qkv", shape), options={"scale": shape[-1] ** -0.5})


def _linear(kind: str, rows: int, inputs: int, outputs: int, **options: int) -> Operation:
    given: dict[str, tuple[int, ...]] = {"x": (rows, inputs), "weight": (outputs, inputs)}
    if kind != "quantized":
        given["bias"] = (outputs,)
    if kind == "lora_linear":
        given |= {"a": (inputs, 16), "b": (16, outputs)}
    return Operation(kind=kind, inputs=given, options=options)


_LARGE, _SMALL, _TOKENS = (1, 128, 128, 128), (8, 32, 32, 32), (2, 512, 1024)
OPERATIONS: Mapping[str, Operation] = {
    "conv 3x3, 1x256x256, 3 to 128": _conv(1, 256, 3, 128),
    "conv 3x3, 1x256x256, 128 to 128": _conv(1, 256, 128, 128),
    "conv 3x3, 1x256x256, 128 to 3": _conv(1, 256, 128, 3),
    "conv 3x3, 1x32x32, 512 to 512": _conv(1, 32, 512, 512),
    "conv 3x3, 8x32x32, 32 to 32": _conv(8, 32, 32, 32),
    "conv 3x3, 8x8x8, 96 to 96": _conv(8, 8, 96, 96),
    "conv 3x3 stride 2, 1x256x256, 128 to 128": _conv(1, 256, 128, 128, stride=2, padding=1),
    "conv 3x3 stride 2, 8x64x64, 16 to 32": _conv(8, 64, 16, 32, stride=2, padding=1),
    "conv 1x1, 1x64x64, 512 to 512": _conv(1, 64, 512, 512, 1),
    "norm, SiLU, conv 3x3, 1x128x128, 128 to 128": _conv(1, 128, 128, 128, kind="norm_silu_conv2d"),
    "norm, SiLU, conv 3x3, 8x32x32, 32 to 32": _conv(8, 32, 32, 32, kind="norm_silu_conv2d"),
    "upsampling, conv 3x3, 1x64x64, 256 to 256": _conv(1, 64, 256, 256, kind="repeat_conv2d"),
    "transposed conv 3x3, 32x32x32, 64 to 32": _conv(32, 32, 64, 32, kind="conv_transpose2d", stride=2),
    "group norm, 1x128x128x128": _norm("group_norm", *_LARGE, images=True),
    "group norm, SiLU, 1x128x128x128": _norm("group_norm_silu", *_LARGE, images=True),
    "group norm, SiLU, 8x32x32x32": _norm("group_norm_silu", *_SMALL, images=True),
    "batch norm, 8x32x32x32": _norm("batch_norm", *_SMALL, images=True),
    "layer norm, 2x512x1024": _norm("layer_norm", *_TOKENS),
    "RMS norm, 2x512x1024": _norm("rms_norm", *_TOKENS, shift=False),
    **{
        f"{name}, 2x512x1024": Operation(kind=kind, inputs={"x": _TOKENS})
        for name, kind in {
            "SiLU": "silu",
            "GELU": "gelu",
            "GELU, tanh": "gelu_tanh",
            "leaky ReLU": "leaky_relu",
            "softmax": "softmax",
        }.items()
    },
    "attention, 1x1024 tokens, 8 heads of 128": _attention(1, 1024, 8, 128),
    "attention, 4x77 tokens, 8 heads of 64": _attention(4, 77, 8, 64),
    "RMS norm of heads and rotary embedding, 1x1024 tokens, 8 heads of 128": Operation(
        kind="rotary", inputs={"x": (1, 1024, 8, 128)}, options={"tokens": 1024, "width": 128}
    ),
    "linear, 384 rows, 1024 to 4096": _linear("linear", 384, 1024, 4096),
    "linear, 128 rows, 192 to 192": _linear("linear", 128, 192, 192),
    "linear with LoRA, 384 rows, 1024 to 4096": _linear("lora_linear", 384, 1024, 4096),
    "linear with LoRA, 128 rows, 192 to 192": _linear("lora_linear", 128, 192, 192),
    "linear, 4 bits, 384 rows, 1024 to 4096": _linear("quantized", 384, 1024, 4096, bits=4),
    "linear, 8 bits, 384 rows, 1024 to 4096": _linear("quantized", 384, 1024, 4096, bits=8),
}
ADAMW = f"AdamW, {LEAVES} matrices of 192x192"


def rows(options: Options) -> list[Row]:
    """The measurements."""
    works = [
        _row(options, f"{name}, {what}", "operation", {"name": name, "backward": backward}, operation.images)
        for name, operation in OPERATIONS.items()
        for what, backward in (("forward", False), ("with backward", True))
    ]
    return [*works, _row(options, ADAMW, "adamw", {}, images=False)]


def _row(options: Options, work: str, build: str, settings: Mapping[str, Any], images: bool) -> Row:
    ours = Implementation(
        name="mflux-vae",
        build=f"benchmarks.kernels:our_{build}",
        settings=settings,
        imports=("mflux_vae.kernels", "mflux_vae_train.optimizers.adam"),
    )
    return Row(
        work=work,
        ours=ours,
        peers=[
            Implementation(
                name=name,
                build=f"benchmarks.kernels:torch_{build}",
                settings={**settings, "channels_last": variant.get("channels_last", False), "gpu": options.gpu},
                imports=("torch",),
            )
            for name, variant in replace(options, compiled=False).torch_variants(images=images).items()
        ],
        beside=[] if options.gpu else [replace(ours, name=PLAIN, environment={"MFLUX_VAE_NATIVE": "0"})],
        target=1.0,
    )


def inputs(operation: Operation) -> dict[str, np.ndarray]:
    """Random arrays; weights of quantized products are multiples of one step from 0 to 1, all in every group."""
    given = {name: noise(name, shape) for name, shape in operation.inputs.items()}
    for name in given.keys() & {"weight", "a", "b"}:
        given[name] *= np.float32(np.prod(given[name].shape[1:]) ** -0.5)
    if operation.kind == "quantized":
        levels = 2 ** operation.options["bits"] - 1
        weight = np.round(np.abs(np.sin(given["weight"] * 1e3)) * levels)
        weight[:, ::GROUP_SIZE], weight[:, 1::GROUP_SIZE] = 0, levels
        given["weight"] = weight.astype(np.float32) / np.float32(levels)
    return given


def angles(tokens: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (tokens, width), the same for both channels of a pair."""
    angle = np.repeat(np.arange(tokens)[:, None] * 10_000.0 ** -(np.arange(0, width, 2) / width), 2, axis=-1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def our_operation(name: str, backward: bool) -> Work:
    """This project's operation, and its gradients."""
    import mlx.core as mx

    operation = OPERATIONS[name]
    arrays = {key: mx.array(array) for key, array in inputs(operation).items()}
    call = _our_function(operation, arrays)
    given = list(arrays.values())
    if not backward:
        return mlx_work(lambda: {"output": call(*given)})
    cotangent = mx.array(noise("cotangent", call(*given).shape))

    def run() -> dict[str, mx.array]:
        (output,), gradients = mx.vjp(call, given, [cotangent])
        return {"output": output, **dict(zip(arrays, gradients, strict=True))}

    return mlx_work(run)


def _our_function(operation: Operation, arrays: dict[str, Any]) -> Callable[..., Any]:
    """The function of the arrays; those that are constant are taken out."""
    import mlx.core as mx

    from mflux_vae import kernels

    options = operation.options
    if operation.kind == "quantized":
        scheme = {"group_size": GROUP_SIZE, **options}
        packed = mx.quantize(arrays.pop("weight"), **scheme)
        return lambda x: kernels.quantized_product(x, *packed, **scheme)
    if operation.kind == "rotary":
        cos, sin = (mx.array(part)[:, None] for part in angles(**options))
        sin = sin * mx.array([-1.0, 1.0] * (sin.shape[-1] // 2))
        return lambda x: kernels.norm_rotary([x], [mx.ones(options["width"])], (cos, sin), EPS)
    functions: dict[str, Callable[..., Any]] = {
        "conv2d": lambda x, w, b: kernels.conv2d(x, w, b, **options),
        "norm_silu_conv2d": lambda x, s, t, w, b: kernels.norm_silu_conv2d(x, (GROUPS, s, t, EPS), w, b, **options),
        "repeat_conv2d": lambda x, w, b: kernels.repeat_conv2d(x, w, b, **options),
        "conv_transpose2d": lambda x, w, b: kernels.conv_transpose2d(x, w, b),
        "group_norm": lambda x, s, t: kernels.group_norm(x, GROUPS, s, t, EPS),
        "group_norm_silu": lambda x, s, t: kernels.group_norm_silu(x, GROUPS, s, t, EPS),
        "batch_norm": lambda x, s, t: kernels.batch_norm(x, s, t, EPS)[0],
        "layer_norm": lambda x, s, t: kernels.layer_norm(x, s, t, EPS),
        "rms_norm": lambda x, s: kernels.rms_norm(x, s, EPS),
        "leaky_relu": lambda x: kernels.leaky_relu(x, 0.01),
        "attention": lambda q, k, v: kernels.attention(q, k, v, **options),
        "lora_linear": lambda x, w, bias, a, b: kernels.lora_linear(x, w, bias, a, b, 1.0),
    }
    return functions.get(operation.kind) or getattr(kernels, operation.kind)


def torch_operation(name: str, backward: bool, channels_last: bool, gpu: bool) -> Work:
    """torch's operation, and its gradients."""
    import torch

    operation, device = OPERATIONS[name], torch_device(gpu)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def image(array: Any) -> bool:
        return operation.images and array.ndim == 4

    def tensor(array: np.ndarray) -> Any:
        given = torch.from_numpy(array).to(device)
        return given.permute(0, 3, 1, 2).contiguous(memory_format=layout) if image(array) else given

    def outputs(**tensors: Any) -> dict[str, Any]:
        return {key: one.permute(0, 2, 3, 1) if image(one) else one for key, one in tensors.items()}

    tensors = {key: tensor(array) for key, array in inputs(operation).items()}
    call = _torch_function(operation, tensors, device)
    given = list(tensors.values())
    with torch.inference_mode():
        shape = outputs(output=call(*given))["output"].shape

    def forward() -> dict[str, Any]:
        with torch.inference_mode():
            return outputs(output=call(*given))

    if not backward:
        return torch_work(forward, device)
    cotangent = tensor(noise("cotangent", tuple(shape)))
    for one in given:
        one.requires_grad_()

    def run() -> dict[str, Any]:
        output = call(*given)
        gradients = torch.autograd.grad(output, given, cotangent)
        return outputs(output=output, **dict(zip(tensors, gradients, strict=True)))

    return torch_work(run, device)


def _torch_function(operation: Operation, tensors: dict[str, Any], device: str) -> Callable[..., Any]:
    """The function of the tensors; those that are constant are taken out."""
    import torch
    import torch.nn.functional as F

    options = operation.options
    if operation.kind == "quantized":
        weight = tensors.pop("weight")
        return lambda x: F.linear(x, weight)
    if operation.kind == "rotary":
        cos, sin = (torch.from_numpy(part)[:, None].to(device) for part in angles(**options))

        def norm_rotary(x: Any) -> Any:  # as in diffusers
            x = F.rms_norm(x, x.shape[-1:], eps=EPS)
            real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
            return x * cos + torch.stack([-imaginary, real], -1).flatten(3) * sin

        return norm_rotary

    def attention(*heads_second: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in heads_second)
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    functions: dict[str, Callable[..., Any]] = {
        "conv2d": lambda x, w, b: F.conv2d(x, w, b, **options),
        "norm_silu_conv2d": lambda x, s, t, w, b: F.conv2d(F.silu(F.group_norm(x, GROUPS, s, t, EPS)), w, b, **options),
        "repeat_conv2d": lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2), w, b, **options),
        "conv_transpose2d": lambda x, w, b: F.conv_transpose2d(x, w.transpose(0, 1), b, 2, 1, 1),
        "group_norm": lambda x, s, t: F.group_norm(x, GROUPS, s, t, EPS),
        "group_norm_silu": lambda x, s, t: F.silu(F.group_norm(x, GROUPS, s, t, EPS)),
        "batch_norm": lambda x, s, t: F.batch_norm(x, None, None, s, t, training=True, eps=EPS),
        "layer_norm": lambda x, s, t: F.layer_norm(x, s.shape, s, t, EPS),
        "rms_norm": lambda x, s: F.rms_norm(x, s.shape, s, EPS),
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "softmax": lambda x: F.softmax(x, -1),
        "attention": attention,
        "lora_linear": lambda x, w, bias, a, b: F.linear(x, w, bias) + x @ a @ b,
    }
    return functions.get(operation.kind) or getattr(F, operation.kind)


def leaves() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights and gradients."""
    weights, gradients = (
        [noise(f"{kind} {index}", (192, 192)) for index in range(LEAVES)] for kind in ("weight", "gradient")
    )
    return weights, gradients


def our_adamw() -> Work:
    """This project's optimizer."""
    import mlx.core as mx

    from mflux_vae_train.optimizers.adam import AdamW

    weights, gradients = ({str(i): mx.array(one) for i, one in enumerate(arrays)} for arrays in leaves())
    optimizer = AdamW(learning_rate=1e-3, weight_decay=1e-2)

    def run() -> dict[str, mx.array]:
        weights.update(optimizer.apply_gradients(gradients, weights))
        mx.eval(weights, optimizer.state)
        return {"first": weights["0"]}

    return mlx_work(run)


def torch_adamw(channels_last: bool, gpu: bool) -> Work:
    """torch's optimizer."""
    import torch

    device = torch_device(gpu)
    weights, gradients = ([torch.from_numpy(one).to(device) for one in arrays] for arrays in leaves())
    parameters = [torch.nn.Parameter(one) for one in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, fused=True)

    def run() -> dict[str, Any]:
        optimizer.step()
        return {"first": parameters[0]}

    return torch_work(run, device)


def show(results: Sequence[Result]) -> str:
    """Format results as a Markdown table."""
    lines = ["| operation | ours | torch | ratio | spread | plain |", "|---|---|---|---|---|---|"]
    for result in results:
        ours, best = result.ours, result.best
        if ours is None or best is None or result.ratio is None:
            lines.append(f"| {result.row.work} | {result.failure or '; '.join(result.missing)} |")
            continue
        cells = [result.row.work, duration(result.row, ours), duration(result.row, best)]
        cells += [f"**{ratio(result.ratio)}**" if result.ratio < 1 else ratio(result.ratio)]
        cells += [" to ".join(map(ratio, result.spread or ()))]
        cells += [ratio(best.pace / plain.pace) for plain in result.beside]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with Reused() as processes:
        code = main({"kernels": rows}, __doc__, start=processes, show=show)
    sys.exit(code)
