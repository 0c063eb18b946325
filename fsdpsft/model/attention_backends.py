"""The attention kernels, behind one signature, each with what it supports stated as data.

Every backend is ``attend(q, k, v, spec, context)``: q [R, H, S, E], k and v [R, K, S, E], result [R, H, S, E], causal
within each document of ``context``. Rows are laid end to end first. ``sdpa`` is the reference and runs anywhere;
``choose_backend`` takes another only if its output and gradients, on the run's device, are those of the reference.

No CUDA kernel has run in the tests: FlashAttention 2 and 3 follow their documented signatures; ``varlen`` is tested
with CPU kernels registered for its operators; ``flex`` also runs on CPU, unfused.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel

from fsdpsft.errors import ConfigError
from fsdpsft.model.attention import Attend, AttentionContext, AttentionSpec

log = logging.getLogger(__name__)

HALF = frozenset({torch.float16, torch.bfloat16})
ANY_FLOAT = HALF | {torch.float32, torch.float64}
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""What model families call it in their configurations."""

outside_graph: Callable[[Attend], Attend] = torch.compiler.disable
"""Marks a backend at which a compiled block's graph is cut: it runs as it is. Without the mark it is traced."""


@dataclass(frozen=True)
class Requirements:
    """What a model, its device and its precision ask of a backend."""

    device: str
    dtype: torch.dtype
    head_size: int
    features: frozenset[str]
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Backend:
    """A kernel and its limits.

    Attributes:
        attend: the function; see the module's docstring.
        devices: device types it runs on.
        dtypes: of q, k and v.
        features: what it does exactly, of sliding_window, softcap, sinks, gqa, dropout, value_head_size (v's heads
            differ in size from q's).
        missing: returns why it cannot be used in this installation, or None.
        max_head_size, head_size_multiple: bounds on E.
        min_capability: lowest CUDA compute capability.
        second: a slower way to call the same kernel, for where ``attend`` does not prove itself.
        auto_for: ``auto`` takes it only for a model that needs one of these features; None for any model.
    """

    attend: Attend
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    features: frozenset[str]
    missing: Callable[[], str | None] = lambda: None
    max_head_size: int | None = None
    head_size_multiple: int = 1
    min_capability: tuple[int, int] = (0, 0)
    second: Attend | None = None
    auto_for: frozenset[str] | None = None


def requirements(model: PreTrainedModel, device: torch.device | str, dtype: torch.dtype) -> Requirements:
    """Read what a model (weights may be on meta) needs, for compute on ``device`` in ``dtype``."""
    config, device = model.config.get_text_config(), torch.device(device)
    heads = config.num_attention_heads
    head_size = max(
        getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads,
        getattr(config, "global_head_dim", None) or 0,
    )
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    asked = {
        "sliding_window": "sliding_attention" in layer_types if layer_types else window,
        "softcap": getattr(config, "attn_logit_softcapping", None) is not None,
        "sinks": any(name.endswith("sinks") for name, _ in model.named_parameters()),
        "gqa": (getattr(config, "num_key_value_heads", None) or heads) != heads,
        "dropout": any((getattr(config, name, None) or 0.0) > 0 for name in ATTENTION_DROPOUT),
        "value_head_size": (getattr(config, "v_head_dim", None) or head_size) != head_size,
    }
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return Requirements(device.type, dtype, head_size, frozenset(k for k, v in asked.items() if v), capability)


def objections(name: str, needs: Requirements) -> list[str]:
    """Every reason why backend ``name`` cannot serve ``needs``; empty where it can."""
    backend = BACKENDS[name]
    multiple, largest = backend.head_size_multiple, backend.max_head_size
    checks = [
        (needs.device not in backend.devices, f"it runs on {sorted(backend.devices)}, not {needs.device}"),
        (needs.dtype not in backend.dtypes, f"it does not take {needs.dtype}"),
        (needs.device == "cuda" and needs.capability < backend.min_capability, f"the GPU is {needs.capability}"),
        (largest is not None and needs.head_size > largest, f"head size {needs.head_size} is above {largest}"),
        (needs.head_size % multiple != 0, f"head size {needs.head_size} is no multiple of {multiple}"),
    ]
    found = [reason for failed, reason in checks if failed]
    found += [f"it has no {feature}" for feature in sorted(needs.features - backend.features)]
    if not found and (reason := backend.missing()) is not None:  # last, as it imports a package
        found.append(reason)
    return found


def choose_backend(
    name: str, needs: Requirements, prove: Callable[[Attend, Requirements], str | None] | None = None
) -> Backend:
    """Return the named backend, or for ``auto`` the first of ``BACKENDS`` (fastest first) that serves ``needs``.

    Args:
        name: ``auto`` or one of ``BACKENDS``.
        needs: from ``requirements``.
        prove: runs the kernel on the device and returns what is wrong with it, or None; ``disagreement`` by default.

    Raises:
        ConfigError: the name is unknown, or the backend cannot serve the model; with each reason.
    """
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"model.attn_implementation={name} is not known; choose auto or one of {list(BACKENDS)}.")
    automatic = [n for n, b in BACKENDS.items() if b.auto_for is None or b.auto_for & needs.features]
    refused: list[str] = []
    for candidate in automatic if name == "auto" else [name]:
        reasons, backend = objections(candidate, needs), BACKENDS[candidate]
        for attend in filter(None, () if reasons else (backend.attend, backend.second)):
            wrong = (prove or disagreement)(attend, needs)
            if wrong is None:
                log.info("Attention: %s", "; not ".join([f"{candidate} ({attend.__name__})", *refused, *reasons]))
                return replace(backend, attend=attend) if attend is backend.second else backend
            reasons.append(f"{attend.__name__}: {wrong}")
        refused.append(f"{candidate}: {', '.join(reasons)}")
    raise ConfigError(
        f"model.attn_implementation={name} cannot be used: {'; '.join(refused)}. "
        "Set model.attn_implementation=auto, or sdpa, which has every feature."
    )


def disagreement(attend: Attend, needs: Requirements) -> str | None:
    """Run a backend on a small batch on the run's device and compare it with ``attend_sdpa`` in float32.

    The batch has documents of several lengths and every feature that ``needs`` names, but for dropout, which draws.

    Returns:
        What is wrong, or None: output and gradients agree to rounding.
    """
    if attend is attend_sdpa:
        return None
    try:
        found = _outputs(attend, needs, needs.dtype)
    except Exception as error:  # noqa: BLE001  # a kernel that does not start may raise anything; it is not taken
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    tolerance = 0.03 if needs.dtype in HALF else 1e-3
    for name, expected in _outputs(attend_sdpa, needs, torch.float32).items():
        off = float((found[name].float() - expected).norm() / expected.norm())
        if not off <= tolerance:  # also where it is not a number
            return f"its {name} differs from attention by sdpa by {off:.1e} of its norm"
    return None


def _outputs(attend: Attend, needs: Requirements, dtype: torch.dtype) -> dict[str, Tensor]:
    """Attention's output and gradients on made-up inputs, which are the same for each ``dtype``."""
    lengths, dice, features = (5, 130, 1, 64), torch.Generator().manual_seed(0), needs.features

    def made_up(*shape: int, factor: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=dice) * factor
        return values.to(needs.dtype).to(needs.device, dtype).requires_grad_()

    kv_shape = (1, 2 if "gqa" in features else 8, sum(lengths), needs.head_size)
    q, k, v = made_up(1, 8, *kv_shape[2:], factor=3.0), made_up(*kv_shape), made_up(*kv_shape)
    sinks = made_up(8) if "sinks" in features else None
    window, softcap = 16 if "sliding_window" in features else None, 2.0 if "softcap" in features else None
    spec = AttentionSpec(needs.head_size**-0.5, window, softcap, sinks)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=needs.device)
    with torch.enable_grad():
        output = attend(q, k, v, spec, AttentionContext(bounds, lengths, max(lengths), attend))
        leaves = [leaf for leaf in (q, k, v, sinks) if leaf is not None]
        gradients = torch.autograd.grad(output, leaves, made_up(*output.shape).detach())
    names = ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of the sinks")
    return dict(zip(names, (output.detach(), *gradients), strict=False))


def _lay_end_to_end(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # [R, H, S, E] -> [T, H, E], a view for what transformers' layers produce


def _back_to_rows(x: Tensor, rows: int) -> Tensor:
    return torch.unflatten(x, 0, (rows, -1)).transpose(1, 2)  # [T, H, E] -> [R, H, S, E]


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L] true where a query (row) sees a key (column)."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def _plain_formula(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention written out, for soft-capped scores and sinks; softmax in at least float32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)) * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~_band(q.shape[2], spec.sliding_window, q.device), float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    accurate = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=accurate)[..., : k.shape[2]].to(v.dtype)
    return F.dropout(weights, spec.dropout) @ v


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention in n documents of one length: q [n, H, L, E], k and v [n, K, L, E]."""
    if spec.softcap is not None or spec.sinks is not None:
        return _plain_formula(q, k, v, spec)
    length, window = q.shape[2], spec.sliding_window
    mask = None if window is None or length <= window else _band(length, window, q.device)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=spec.dropout,
        is_causal=mask is None,
        scale=spec.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


@outside_graph  # a traced loop over documents would be compiled again for each batch
def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
    """The reference: ``scaled_dot_product_attention`` document by document, neighbours of equal length together.

    Works on any device and has every feature. ``split`` instead of slices: its backward is one concatenation, theirs a
    zero-filled copy of the whole for each document.
    """
    if q.device.type == "cpu" and q.dtype in HALF:  # float32 saves a tenth of a whole step there, as measured
        return attend_sdpa(q.float(), k.float(), v.float(), spec, context).to(q.dtype)
    runs = [(len(list(group)), length) for length, group in groupby(context.seqlens)]
    sizes = [count * length for count, length in runs]
    parts = [torch.split(_lay_end_to_end(x), sizes) for x in (q, k, v)]
    outputs = []
    for run, *tokens in zip(runs, *parts, strict=True):
        query, key, value = (torch.unflatten(x, 0, run).transpose(1, 2) for x in tokens)  # [n, H, L, E]
        outputs.append(_lay_end_to_end(_attend_documents(query, key, value, spec)))
    return _back_to_rows(torch.cat(outputs), q.shape[0])


def _flash_window(window: int | None) -> tuple[int, int]:
    return (-1, -1) if window is None else (window - 1, 0)  # FlashAttention counts the keys left of the query's own


def _attend_flash(
    module: str, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext, **options: Any
) -> Tensor:
    """FlashAttention by its Python package; some releases return the log-sum-exp beside the output."""
    bounds, longest = context.cu_seqlens, context.max_seqlen
    result = import_module(module).flash_attn_varlen_func(
        _lay_end_to_end(q), _lay_end_to_end(k), _lay_end_to_end(v), cu_seqlens_q=bounds, cu_seqlens_k=bounds,
        max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=spec.scaling, causal=True,
        window_size=_flash_window(spec.sliding_window), softcap=spec.softcap or 0.0, **options,
    )  # fmt: skip
    return _back_to_rows(result[0] if isinstance(result, tuple) else result, q.shape[0])


@outside_graph
def attend_flash_2(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
    """FlashAttention 2 (package ``flash-attn`` 2.6 or later, for ``softcap``). On CUDA."""
    return _attend_flash("flash_attn", q, k, v, spec, context, dropout_p=spec.dropout)


@outside_graph
def attend_flash_3(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
    """FlashAttention 3 (module ``flash_attn_interface``), for Hopper. On CUDA."""
    _refuse_dropout("flash_attention_3", spec)
    return _attend_flash("flash_attn_interface", q, k, v, spec, context)


def _refuse_dropout(name: str, spec: AttentionSpec) -> None:
    """Refuse dropout in a kernel without it: ``requirements`` may not know a family's own name for it.

    Raises:
        ConfigError: the layer asks for dropout.
    """
    if spec.dropout > 0:
        raise ConfigError(
            f"model.attn_implementation={name} has no dropout, and a layer of this model asks for {spec.dropout}. Set "
            "model.attn_implementation=sdpa, or the dropout in the model's config.json to 0."
        )


# Looked up here and not at each call, which would cut a compiled block's graph. torch 2.11 has no such flag, though
# its kernel takes grouped heads.
_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
_VARLEN_OPTIONS: dict[str, Any] = {"enable_gqa": True} if _GROUPED else {}


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn``: FlashAttention inside torch, on CUDA.

    A custom operator, so a compiled block's graph is not cut here.
    """
    _refuse_dropout("varlen", spec)
    window = (-1, 0) if spec.sliding_window is None else _flash_window(spec.sliding_window)
    bounds, longest = context.cu_seqlens, context.max_seqlen
    output: Any = varlen_attn(
        _lay_end_to_end(q), _lay_end_to_end(k), _lay_end_to_end(v), bounds, bounds, longest, longest,
        scale=spec.scaling, window_size=window, **_VARLEN_OPTIONS,
    )  # fmt: skip
    return _back_to_rows(output, q.shape[0])


def attend_varlen_repeated(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
    """``attend_varlen`` with a key and value head for each query head, for a kernel that wants it so."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return attend_varlen(q, k, v, spec, context)


def _block_mask(context: AttentionContext, window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's mask of this batch and window, made by the first layer that needs it."""
    if window not in context.derived:
        total = sum(context.seqlens)
        lengths = context.cu_seqlens.diff()
        document = torch.arange(len(context.seqlens), device=device).repeat_interleave(lengths, output_size=total)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (query >= key) & (document[query] == document[key])
            return seen if window is None else seen & (query - key < window)

        on_gpu = device.type == "cuda"  # compiled, the mask is never written out as total x total
        context.derived[window] = create_block_mask(visible, None, None, total, total, device=device, _compile=on_gpu)
    mask: BlockMask = context.derived[window]
    return mask


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@outside_graph
def attend_flex(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
    """FlexAttention with a document, causal and window mask; compiled on CUDA; on CPU forward only.

    A sink takes its share of the softmax after the kernel, which also returns the log-sum-exp of the scores.
    """
    _refuse_dropout("flex", spec)
    cap = spec.softcap or 0.0

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    run: Any = _compiled_flex() if q.device.type == "cuda" else flex_attention
    flat = [_lay_end_to_end(x).transpose(0, 1)[None] for x in (q, k, v)]  # [1, H, T, E]
    output, more = run(
        *flat,
        score_mod=capped if cap else None,
        scale=spec.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        block_mask=_block_mask(context, spec.sliding_window, q.device),
        return_aux=AuxRequest(lse=True),
    )
    if spec.sinks is not None:
        share = torch.sigmoid(more.lse - spec.sinks.to(more.lse.dtype)[:, None])  # [1, H, T], of the tokens
        output = (output * share[..., None]).to(output.dtype)
    return _back_to_rows(output[0].transpose(0, 1), q.shape[0])


def _needs(module: str, package: str) -> Callable[[], str | None]:
    """Why a package's kernel cannot be imported; a folder of the package's name does not make it usable."""

    def missing() -> str | None:
        try:
            import_module(module).flash_attn_varlen_func  # noqa: B018
        except Exception as error:  # noqa: BLE001  # a package built for another torch may raise anything
            absent = isinstance(error, ModuleNotFoundError) and error.name == module
            return f"{package} is not installed" if absent else f"{package} cannot be imported: {error}"
        return None

    return missing


CUDA = frozenset({"cuda"})
_FLASH = frozenset({"gqa", "sliding_window", "softcap"})
BACKENDS: dict[str, Backend] = {
    "flash_attention_3": Backend(
        attend_flash_3, CUDA, HALF, _FLASH, _needs("flash_attn_interface", "FlashAttention 3"),
        max_head_size=256, head_size_multiple=8, min_capability=(9, 0),
    ),
    "flash_attention_2": Backend(
        attend_flash_2, CUDA, HALF, _FLASH | {"dropout"}, _needs("flash_attn", "flash-attn"),
        max_head_size=256, head_size_multiple=8, min_capability=(8, 0),
    ),
    "varlen": Backend(
        attend_varlen, CUDA, HALF, frozenset({"gqa", "sliding_window"}), max_head_size=256, head_size_multiple=8,
        min_capability=(8, 0), second=attend_varlen_repeated,
    ),
    "flex": Backend(
        attend_flex, CUDA, HALF | {torch.float32}, _FLASH | {"sinks"}, max_head_size=256, min_capability=(8, 0),
        auto_for=frozenset({"softcap", "sinks"}),
    ),
    "sdpa": Backend(
        attend_sdpa, frozenset({"cpu", "cuda", "mps", "xpu"}), ANY_FLOAT,
        _FLASH | {"sinks", "dropout", "value_head_size"},
    ),
}  # fmt: skip
"""By name, the one ``auto`` prefers first."""
