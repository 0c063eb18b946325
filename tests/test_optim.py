"""AdamW in all its dtypes against the plain formula, and clipping against hand-made norms."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fsdpsft import optim
from fsdpsft.optim import MixedAdamW, build_optimizer, clip_grad_norm, decay_report, decaying, parameter_groups, set_lr
from fsdpsft.testing import run_distributed, tiny_model
from tests.parity.reference import SlowAdamW


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]


def test_two_groups() -> None:
    groups = parameter_groups(small_model(), 0.1)
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 2), (0.0, 4)]  # type: ignore[arg-type]


LLAMA = {"embed_tokens.weight", *(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))}
MIXTURE = {"embed_tokens.weight", *(f"{name}_proj.weight" for name in "qkvo"), "gate_up_proj", "down_proj"}
DECAYING: dict[str, tuple[dict[str, Any], set[str]]] = {  # family: settings, and the ends of the names that decay
    "llama": ({}, LLAMA),
    "qwen3": ({}, LLAMA),  # norms of queries and keys have one dimension
    "cohere": ({"use_qk_norm": True}, LLAMA),  # there they have two
    "diffllama": ({}, LLAMA),
    "apertus": ({}, LLAMA - {"gate_proj.weight"}),
    "mamba": ({}, {"embeddings.weight", *(f"{name}_proj.weight" for name in ("in", "x", "dt", "out"))}),
    "gpt2": ({}, {"wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"}),
    "mixtral": ({"num_local_experts": 4}, {*MIXTURE, "gate.weight"}),
    "gpt_oss": ({"num_local_experts": 4}, {*MIXTURE, "router.weight"}),  # its experts' biases have two dimensions
}


@pytest.mark.parametrize("family", DECAYING)
def test_what_decays_by_family(family: str) -> None:
    settings, ends = DECAYING[family]
    model = tiny_model(family, **settings)
    found = decaying(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    decayed = {name for name, decays in found.items() if decays}
    assert decayed == {name for name in found if name.endswith(tuple(f".{end}" for end in ends))}
    assert {end for end in ends if any(name.endswith(f".{end}") for name in decayed)} == ends
    by_id = {id(p): name for name, p in model.named_parameters()}
    in_group = [{by_id[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)]  # type: ignore[attr-defined]
    assert in_group == [decayed, set(found) - decayed]


def test_adapters_decay_but_not_the_magnitudes_of_dora() -> None:
    targets = ["q_proj", "embed_tokens"]
    settings = LoraConfig(r=2, target_modules=targets, use_dora=True, modules_to_save=["norm"])
    model = get_peft_model(tiny_model("llama"), settings)
    kinds = {re.findall(r"lora_\w+|modules_to_save", name)[0]: decays for name, decays in decaying(model).items()}
    adapters = dict.fromkeys(("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"), True)
    assert kinds == {**adapters, "lora_magnitude_vector": False, "modules_to_save": False}


def test_the_report_names_each_kind_of_parameter_once() -> None:
    lines = decay_report(tiny_model("cohere", use_qk_norm=True)).splitlines()
    assert "  decays: model.layers.*.self_attn.q_proj.weight (2 of them)" in lines
    assert "  does not: model.layers.*.self_attn.q_norm.weight (2 of them)" in lines
    assert len(lines) == 1 + 8 + 4


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float64, torch.float32, 1e-6),
        # bfloat16 keeps 8 bits: 2^-9 relative a rounding of the moments, and of the weights where they are bfloat16.
        (torch.float32, torch.bfloat16, 6e-3),
        (torch.bfloat16, torch.float32, 6e-3),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
)
def test_equals_the_formula(dtype: torch.dtype, state_dtype: torch.dtype, tolerance: float) -> None:
    model, slow_model = small_model(dtype), small_model(torch.float64)
    optimizer = build_optimizer(model, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, state_dtype=state_dtype)
    assert isinstance(optimizer, MixedAdamW) == (dtype != state_dtype)
    slow = SlowAdamW(list(slow_model.named_parameters()), (0.9, 0.95), 1e-8, 0.1)
    for step in range(5):
        set_lr(optimizer, 1e-2 / (step + 1))
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient.to(dtype)
        optimizer.step()
        slow.step(gradients(model, step), 1e-2 / (step + 1))
    for parameter, expected in zip(model.parameters(), slow_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), expected, rtol=tolerance, atol=tolerance)
    state = optimizer.state[next(model.parameters())]
    assert state["exp_avg"].dtype == state_dtype and state["exp_avg_sq"].dtype == state_dtype


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (4, 2, 3), (0, 3)])
def test_an_update_in_pieces_is_the_update(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    def stepped() -> torch.Tensor:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(shape))
        optimizer = MixedAdamW(
            [{"params": [parameter]}], lr=0.1, betas=(0.9, 0.95), eps=1e-8, state_dtype=torch.bfloat16
        )
        for _ in range(3):
            parameter.grad = torch.randn(shape)
            optimizer.step()
        return parameter.detach()

    whole = stepped()
    monkeypatch.setattr(optim, "_CPU_PIECE", 6)
    updates = []
    update = optim._adamw_update
    monkeypatch.setattr(optim, "_adamw_update", lambda ts, *rest: updates.append(ts[0].numel()) or update(ts, *rest))
    assert torch.equal(stepped(), whole)
    assert max(updates, default=0) <= 6 and sum(updates) == 3 * whole.numel()


def test_a_bfloat16_weight_is_rounded_once_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4096).bfloat16()
    parameter = nn.Parameter(weight.clone())
    optimizer = MixedAdamW(
        [{"params": [parameter], "weight_decay": 0.5}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, state_dtype=torch.float32
    )
    parameter.grad = torch.randn(4096).bfloat16()
    optimizer.step()
    sign = parameter.grad.double().sign()  # the first step's update but for eps
    exact = weight.double() * (1 - 1e-2 * 0.5) - 1e-2 * sign
    once = exact.bfloat16()
    twice = ((weight.double() * (1 - 1e-2 * 0.5)).bfloat16().double() - 1e-2 * sign).bfloat16()
    assert (parameter != once).float().mean() < 1e-3 < 0.1 < (twice != once).float().mean()


def clipped_on_two_processes() -> tuple[float, list[float]]:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(torch.tensor([3.0, 0.0, 0.0, 4.0]), mesh, [Shard(0)])
    norm = clip_grad_norm([parameter], 1.0)
    return norm.item(), parameter.grad.full_tensor().tolist()


def test_clipping_goes_by_the_norm_over_all_processes() -> None:
    for norm, gradient in run_distributed(clipped_on_two_processes, 2):
        assert norm == pytest.approx(5.0)
        assert gradient == pytest.approx([0.6, 0.0, 0.0, 0.8], rel=1e-5)


def test_clipping_scales_to_the_norm_and_reports_the_one_before() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_grad_norm([first, second], 1.0).item() == pytest.approx(5.0)
    assert first.grad.tolist() == pytest.approx([0.6, 0.0], rel=1e-5) and second.grad.item() == pytest.approx(
        0.8, rel=1e-5
    )


def test_no_clipping_below_the_bound_or_without_one() -> None:
    for bound in (10.0, None):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, 4.0])
        assert clip_grad_norm([parameter], bound).item() == pytest.approx(5.0)
        assert parameter.grad.tolist() == [3.0, 4.0]


def test_non_finite_gradients_show_in_the_norm() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([math.nan, 1.0])
    assert not math.isfinite(clip_grad_norm([parameter], 1.0).item())
