"""Attention: documents kept apart, each backend equal to attention written out in float64, refusals by name."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from fsdpsft.batch import Sample, pack
from fsdpsft.errors import ConfigError, ModelError
from fsdpsft.model import attention_backends
from fsdpsft.model.attention import (
    IMPLEMENTATION,
    AttentionContext,
    AttentionSpec,
    attention_forward,
    check_architecture,
    isolation_probe,
)
from fsdpsft.model.attention_backends import (
    BACKENDS,
    Requirements,
    attend_flash_2,
    attend_flash_3,
    attend_flex,
    attend_sdpa,
    attend_varlen,
    attend_varlen_repeated,
    choose_backend,
    disagreement,
    objections,
    requirements,
)
from fsdpsft.testing import tiny_model

FAMILIES = ["qwen2", "qwen3", "llama", "gemma2", "gemma3_text", "mistral", "phi3", "mixtral", "qwen2_moe", "gpt_oss"]
MIXTURES = {"mixtral", "qwen2_moe", "gpt_oss"}
WINDOWED = {"gemma2", "gemma3_text", "mistral", "phi3", "gpt_oss"}


def written_out(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, seqlens: tuple[int, ...]) -> Tensor:
    """The slow twin: one query token and one head at a time, float64, Python loops. q [H, T, E]."""
    heads, total, _ = q.shape
    group = heads // k.shape[0]
    output = torch.empty(heads, total, v.shape[-1], dtype=q.dtype)
    start = 0
    for length in seqlens:
        for t in range(start, start + length):
            first = start if spec.sliding_window is None else max(start, t - spec.sliding_window + 1)
            for h in range(heads):
                scores = k[h // group, first : t + 1] @ q[h, t] * spec.scaling
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                weights = scores.exp()
                extra = 0 if spec.sinks is None else spec.sinks[h].exp()
                output[h, t] = weights @ v[h // group, first : t + 1] / (weights.sum() + extra)
        start += length
    return output


def context_of(seqlens: tuple[int, ...], attend=attend_sdpa) -> AttentionContext:
    bounds = torch.tensor(np.concatenate([[0], np.cumsum(seqlens)]), dtype=torch.int32)
    return AttentionContext(bounds, seqlens, max(seqlens), attend)


def random_qkv(heads: int, kv_heads: int, total: int, size: int = 16, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * 1000 + total)
    shapes = [(1, n, total, size) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


SPECS = {
    "plain": AttentionSpec(0.3),
    "window": AttentionSpec(0.3, sliding_window=3),
    "softcap": AttentionSpec(0.3, softcap=1.5),
    "window+softcap": AttentionSpec(0.3, sliding_window=3, softcap=1.5),
    "sinks": AttentionSpec(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)),
    "window+sinks": AttentionSpec(0.3, 3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", SPECS)
def test_sdpa_equals_attention_written_out(name, kv_heads):
    seqlens = (5, 1, 1, 7, 7, 7, 2)
    q, k, v = random_qkv(4, kv_heads, sum(seqlens))
    found = attend_sdpa(q, k, v, SPECS[name], context_of(seqlens))
    expected = written_out(q[0], k[0], v[0], SPECS[name], seqlens)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_flex_equals_sdpa(name, monkeypatch):
    """Forward and backward, by the unfused formula that torch has for the CPU, though it refuses gradients there."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    seqlens = (5, 1, 130, 7)
    leaves = [x.requires_grad_() for x in random_qkv(4, 2, sum(seqlens), dtype=torch.float32)]
    spec = SPECS[name]
    if spec.sinks is not None:
        spec = replace(spec, sinks=spec.sinks.float().requires_grad_())
        leaves.append(spec.sinks)
    found, expected = [], []
    for attend, results in ((attend_flex, found), (attend_sdpa, expected)):
        output = attend(*leaves[:3], spec, context_of(seqlens))
        results += [output, *torch.autograd.grad(output.square().sum(), leaves)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_flex_makes_its_mask_once_a_batch_and_window():
    context = context_of((5, 6))
    q, k, v = random_qkv(4, 2, 11, dtype=torch.float32)
    for window in (None, 3, None, 3):
        attend_flex(q, k, v, AttentionSpec(0.3, sliding_window=window), context)
    assert set(context.derived) == {None, 3}


def test_padded_rows_are_documents():
    q, k, v = (x.view(3, x.shape[1], 4, 16).contiguous() for x in random_qkv(4, 2, 12))
    for attend in (attend_sdpa, attend_flex):
        arguments = [x.float() for x in (q, k, v)]
        found = attend(*arguments, SPECS["plain"], context_of((4, 4, 4)))
        for row in range(3):
            expected = written_out(*(x[row] for x in (q, k, v)), SPECS["plain"], (4,))
            torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-6)


def test_value_heads_may_differ_in_size():
    q, k, v = random_qkv(4, 4, 9)
    found = attend_sdpa(q, k, v[..., :8], SPECS["plain"], context_of((4, 5)))
    torch.testing.assert_close(
        found[0], written_out(q[0], k[0], v[0, ..., :8], SPECS["plain"], (4, 5)), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("attend", [attend_varlen, attend_varlen_repeated])
def test_varlen_is_called_as_each_torch_version_wants(flag, attend, monkeypatch):
    """Torch 2.11 has no flag for grouped heads; a stand-in with each version's signature computes the same on CPU."""
    heard = {}

    def new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        heard.update(longest=max_q, bounds=cu_seq_q.tolist(), heads=key.shape[1], enable_gqa=enable_gqa)
        assert window_size[1] == 0
        spec = AttentionSpec(scale, None if window_size[0] < 0 else window_size[0] + 1)
        rows = [x.transpose(0, 1)[None] for x in (query, key, value)]
        return attend_sdpa(*rows, spec, context_of((4, 5)))[0].transpose(0, 1)

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(attention_backends, "varlen_attn", new if flag else old)
    monkeypatch.setattr(attention_backends, "_VARLEN_OPTIONS", {"enable_gqa": True} if flag else {})
    q, k, v = random_qkv(4, 2, 9)
    for spec in (SPECS["plain"], SPECS["window"]):
        found = attend(q, k, v, spec, context_of((4, 5)))
        torch.testing.assert_close(found[0], written_out(q[0], k[0], v[0], spec, (4, 5)), atol=1e-12, rtol=0)
    heads = 2 if attend is attend_varlen else 4
    assert heard == {"longest": 5, "bounds": [0, 4, 9], "heads": heads, "enable_gqa": flag}


@pytest.mark.parametrize("name", ["plain", "window", "softcap", "window+softcap"])
@pytest.mark.parametrize(
    ("module", "attend", "pair"),
    [("flash_attn", attend_flash_2, False), ("flash_attn_interface", attend_flash_3, True)],
)
def test_flash_attention_is_called_by_its_documented_signature(module, attend, pair, name, monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap,
        dropout_p=0.0,
    ):  # fmt: skip
        assert causal and cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, 4, 9] and dropout_p == 0.0
        assert (max_seqlen_q, max_seqlen_k) == (5, 5)
        left, right = window_size
        assert (left < 0 and right < 0) or right == 0
        spec = AttentionSpec(softmax_scale, None if left < 0 else left + 1, softcap or None)
        output = attend_sdpa(*(x.transpose(0, 1)[None] for x in (q, k, v)), spec, context_of((4, 5)))[0].transpose(0, 1)
        return (output, None) if pair else output

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    q, k, v = random_qkv(4, 2, 9)
    found = attend(q, k, v, SPECS[name], context_of((4, 5)))
    torch.testing.assert_close(found[0], written_out(q[0], k[0], v[0], SPECS[name], (4, 5)), atol=1e-12, rtol=0)


def family(name: str, **changes):
    settings = {"sliding_window": 8} if name in WINDOWED else {}
    model = tiny_model(name, **{**settings, **changes}).eval()
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def hidden_states(model):
    def forward(input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
        return model.model(
            input_ids=input_ids, position_ids=position_ids, attention_context=context, use_cache=False
        ).last_hidden_state

    return forward


@pytest.mark.parametrize("name", FAMILIES)
def test_families_isolate_documents_and_equal_transformers_own_attention(name):
    model = family(name)
    check_architecture(model, packed=True)
    backend = choose_backend("auto", requirements(model, "cpu", torch.float32))
    # Experts multiply all documents' tokens together, so other documents move the rounding, and nothing else.
    tolerance = 2e-6 if name in MIXTURES else 0.0
    assert isolation_probe(hidden_states(model), backend.attend, vocab_size=384) <= tolerance
    documents = [torch.randint(384, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 20, 5)]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    with torch.no_grad():
        packed = hidden_states(model)(torch.cat(documents)[None], positions, context_of((12, 20, 5)))
        model.set_attn_implementation("eager")
        alone = [model.model(input_ids=d[None], use_cache=False).last_hidden_state for d in documents]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=5e-6)


def test_probe_sees_a_leak_and_a_dead_model():
    model = family("qwen2")

    def blind(q, k, v, spec, context):
        return attend_sdpa(q, k, v, spec, context_of((q.shape[2],)))

    assert isolation_probe(hidden_states(model), blind, vocab_size=384) > 1e-3
    with pytest.raises(ModelError, match="proves nothing"):
        isolation_probe(lambda ids, positions, context: torch.zeros(1, ids.shape[1], 4), attend_sdpa, vocab_size=384)


@pytest.mark.parametrize("reentrant", [True, False])
def test_context_passes_through_transformers_checkpointing(reentrant):
    model = family("qwen2").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = torch.arange(9)[None]
    states = model.get_input_embeddings()(ids).requires_grad_()
    model.model(
        inputs_embeds=states, attention_context=context_of((4, 5)), use_cache=False
    ).last_hidden_state.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_no_mask_is_made_and_packing_is_not_guessed_from_positions(monkeypatch):
    import transformers.masking_utils as masking

    def forbidden(position_ids):
        raise AssertionError("looked for packed sequences, which waits for the device")

    monkeypatch.setattr(masking, "find_packed_sequence_indices", forbidden)
    for name in ("qwen2", "gemma2"):
        positions = torch.tensor([[0, 1, 2, 0, 1]])
        hidden_states(family(name))(torch.arange(5)[None], positions, context_of((3, 2)))


def test_context_of_a_batch():
    samples = [Sample(np.arange(n, dtype=np.uint32), np.ones(n, dtype=np.float32), n) for n in (3, 5)]
    context = AttentionContext.of(pack(samples, pad_token_id=0, pad_to_multiple=4), attend_sdpa, "cpu")
    assert context.cu_seqlens.tolist() == [0, 3, 8]
    assert (context.seqlens, context.max_seqlen) == ((3, 5), 5)


def layer(**attributes) -> nn.Module:
    module = nn.Module()
    for key, value in {"config": SimpleNamespace(model_type="oddball"), **attributes}.items():
        setattr(module, key, value)
    return module


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (layer(), {"attention_context": None}, "of oddball does not pass its keyword arguments"),
        (layer(), {"attention_mask": torch.ones(1)}, "builds an attention mask"),
        (layer(), {"position_bias": torch.ones(1)}, "position bias"),
        (layer(is_causal=False), {}, "not causal"),
        (layer(), {"is_causal": False}, "not causal"),
        (layer(layer_type="sliding_attention"), {}, "does not tell attention its window"),
    ],
)
def test_layers_that_would_be_wrong_are_refused(module, arguments, message):
    q, k, v = random_qkv(4, 2, 9)
    with pytest.raises(ModelError, match=message):
        attention_forward(module, q, k, v, **{"attention_context": context_of((4, 5)), **arguments})


def stub_model(class_name: str, parent=nn.Module, **config):
    text = SimpleNamespace(**config)
    model = type(class_name, (parent,), {"_supports_attention_backend": True})()
    model.config = SimpleNamespace(get_text_config=lambda: text)
    return model


def test_recurrent_models_are_refused_when_packed_only():
    model = stub_model("Lfm2ForCausalLM", layer_types=["conv", "full_attention"])
    check_architecture(model, packed=False)
    with pytest.raises(ModelError, match=r"Lfm2ForCausalLM has \['conv'\] layers.*use_remove_padding=false"):
        check_architecture(model, packed=True)
    undeclared = stub_model("NewForCausalLM")
    undeclared.mixer = type("NewMambaMixer", (nn.Module,), {})()
    with pytest.raises(ModelError, match="NewMambaMixer"):
        check_architecture(undeclared, packed=True)


def test_attention_patterns_that_are_not_ours_are_refused():
    with pytest.raises(ModelError, match=r"\['chunked_attention'\]"):
        check_architecture(stub_model("Llama4ForCausalLM", layer_types=["chunked_attention"]), packed=False)
    with pytest.raises(ModelError, match="use_bidirectional_attention"):
        check_architecture(stub_model("Gemma3", use_bidirectional_attention=True), packed=True)
    own_code = stub_model("BloomForCausalLM")
    own_code._supports_attention_backend = False
    with pytest.raises(ModelError, match="BloomForCausalLM has its own attention code"):
        check_architecture(own_code, packed=True)


def needs(*features: str, device="cpu", dtype=torch.float32, head_size=64, capability=(9, 0)) -> Requirements:
    return Requirements(device, dtype, head_size, frozenset(features), capability)


def test_requirements_are_read_from_the_model():
    assert requirements(tiny_model("qwen2"), "cpu", torch.float32).features == {"gqa"}
    assert requirements(tiny_model("gemma2"), "cpu", torch.float32).features == {"gqa", "sliding_window", "softcap"}
    oss = requirements(tiny_model("gpt_oss", num_key_value_heads=4), "cpu", torch.bfloat16)
    assert (oss.features, oss.head_size, oss.dtype) == ({"sliding_window", "sinks"}, 16, torch.bfloat16)


DROPPING = {
    "qwen2": {"attention_dropout": 0.5},
    "gemma2": {"attention_dropout": 0.5, "attn_logit_softcapping": 20.0},  # attention written out
    "phi3": {"attention_dropout": 0.5, "sliding_window": 3},
}


@pytest.mark.parametrize("name", DROPPING)
def test_attention_dropout_is_honoured_in_training(name):
    model = tiny_model(name, **DROPPING[name])
    model.set_attn_implementation(IMPLEMENTATION)
    assert "dropout" in requirements(model, "cpu", torch.float32).features
    ids, positions = torch.arange(9)[None], torch.arange(9)[None]

    @torch.no_grad()
    def states(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return hidden_states(model)(ids, positions, context_of((9,)))

    model.train()
    assert torch.equal(states(0), states(0))
    assert not torch.allclose(states(0), states(1))
    model.eval()
    assert torch.equal(states(0), states(1))


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_dropout_drops_the_share_asked_for_and_scales_up_the_rest(softcap):
    """Averaged over many draws, attention is what it is without dropout; each weight is 0 or twice itself."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 4, 8) for _ in range(2))
    v = torch.eye(4, 8)[None, None]  # the output is the attention weights themselves
    spec = AttentionSpec(8**-0.5, softcap=softcap)
    expected = attend_sdpa(q, k, v, spec, context_of((4,)))
    draws = torch.stack([attend_sdpa(q, k, v, replace(spec, dropout=0.5), context_of((4,))) for _ in range(3000)])
    kept = draws[..., :4] > 0
    torch.testing.assert_close(draws[..., :4][kept], (2 * expected[..., :4]).expand_as(kept)[kept])
    torch.testing.assert_close(draws.mean(0), expected, atol=0.06, rtol=0)


def test_kernels_without_dropout_refuse_it_by_name():
    assert requirements(tiny_model("gpt2", head_dim=None), "cpu", torch.float32).features >= {"dropout"}  # attn_pdrop
    q, k, v = random_qkv(4, 2, 9)
    for attend, name in ((attend_flex, "flex"), (attend_varlen, "varlen")):
        with pytest.raises(ConfigError, match=f"{name} has no dropout, and a layer of this model asks for 0.1"):
            attend(q, k, v, AttentionSpec(1.0, dropout=0.1), context_of((9,)))
    for name in ("flex", "varlen", "flash_attention_3"):
        assert "it has no dropout" in objections(name, needs("dropout", device="cuda", dtype=torch.bfloat16))


def believed(attend, needs):
    """In place of the proof, for there is no CUDA device."""


def test_choice_of_backend():
    assert choose_backend("auto", needs("gqa", "softcap", "sinks")) is BACKENDS["sdpa"]
    assert choose_backend("flex", needs("gqa", "sinks", device="cuda"), believed) is BACKENDS["flex"]
    with pytest.raises(ConfigError, match="flash_attention_9 is not known"):
        choose_backend("flash_attention_9", needs())
    with pytest.raises(ConfigError, match="flex cannot be used: flex: it has no dropout"):
        choose_backend("flex", needs("dropout", device="cuda"), believed)
    with pytest.raises(ConfigError, match=r"varlen cannot be used: varlen: it runs on \['cuda'\], not cpu"):
        choose_backend("varlen", needs())


def test_objections_name_each_reason():
    found = objections("flash_attention_2", needs("sinks", device="cuda", head_size=260, capability=(7, 5)))
    assert found[:5] == [
        "it does not take torch.float32",
        "the GPU is (7, 5)",
        "head size 260 is above 256",
        "head size 260 is no multiple of 8",
        "it has no sinks",
    ]


def test_on_a_gpu_auto_prefers_what_is_installed_and_exact():
    hopper = {"device": "cuda", "dtype": torch.bfloat16}
    installed = [name for name, backend in BACKENDS.items() if backend.missing() is None]
    assert choose_backend("auto", needs("gqa", **hopper), believed) is BACKENDS[installed[0]]
    assert choose_backend("auto", needs("sinks", **hopper), believed) is BACKENDS["flex"]
    assert choose_backend("auto", needs("softcap", device="cuda"), believed) is BACKENDS["flex"]
    assert choose_backend("auto", needs(device="cuda"), believed) is BACKENDS["sdpa"]  # float32 without either
    assert choose_backend("auto", needs("dropout", "sinks", **hopper), believed) is BACKENDS["sdpa"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "flash-attn cannot be imported: .*flash_attn_varlen_func"),  # a folder and nothing in it
        ("import torch_of_another_age", "flash-attn cannot be imported: No module named 'torch_of_another_age'"),
        ("raise OSError('undefined symbol')", "flash-attn cannot be imported: undefined symbol"),
    ],
)
def test_a_package_that_cannot_be_imported_is_passed_over(content, reason, tmp_path, monkeypatch, caplog):
    (tmp_path / "flash_attn").mkdir()
    if content:
        (tmp_path / "flash_attn" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    ampere = needs(device="cuda", dtype=torch.bfloat16, capability=(8, 0))
    with caplog.at_level("INFO"):
        assert choose_backend("auto", ampere, believed) is BACKENDS["varlen"]
    assert re.search(reason, caplog.text)
    with pytest.raises(ConfigError, match=reason):
        choose_backend("flash_attention_2", ampere, believed)
    sys.modules.pop("flash_attn", None)


# --- The proof on the run's device, here with the CPU as the device ------------------------------------------------


def wrong_scale(q, k, v, spec, context):
    return attend_sdpa(q, k, v, replace(spec, scaling=spec.scaling * 1.2), context)


def wrong_window(q, k, v, spec, context):
    return attend_sdpa(q, k, v, replace(spec, sliding_window=spec.sliding_window + 1), context)


def wrong_heads(q, k, v, spec, context):
    """Query head i with key head i modulo their number."""
    return attend_sdpa(q, *(x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v)), spec, context)


def wrong_documents(q, k, v, spec, context):
    return attend_sdpa(q, k, v, spec, context_of((5, 131, 64)))


def wrong_backward(q, k, v, spec, context):
    return attend_sdpa(q, k.detach() * 0.5 + k * 0.5, v, spec, context)


def no_sinks(q, k, v, spec, context):
    return attend_sdpa(q, k, v, replace(spec, sinks=None), context) + 0 * spec.sinks.sum()


def no_softcap(q, k, v, spec, context):
    return attend_sdpa(q, k, v, replace(spec, softcap=None), context)


def broken(q, k, v, spec, context):
    raise ValueError("Expect query and key/value to have the same number of heads")


EVERYTHING = ("gqa", "sliding_window", "sinks", "softcap")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wrong", [wrong_scale, wrong_window, wrong_heads, wrong_documents, wrong_backward, no_sinks, no_softcap, broken]
)
def test_the_proof_sees_what_a_kernel_does_wrong(wrong, dtype):
    assert disagreement(wrong, needs(*EVERYTHING, dtype=dtype, head_size=16))


def test_the_proof_lets_rounding_pass():
    def rounds(q, k, v, spec, context):
        k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))  # in bfloat16, where the reference has float32
        output = [attention_backends._plain_formula(*(x[:, :, a:b] for x in (q, k, v)), spec)
                  for a, b in itertools.pairwise(context.cu_seqlens.tolist())]  # fmt: skip
        return torch.cat(output, dim=2)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert disagreement(rounds, needs(*EVERYTHING, dtype=dtype, head_size=64)) is None


def test_a_kernel_that_fails_its_proof_gives_way(monkeypatch, caplog):
    cpu = {"devices": frozenset({"cpu"}), "dtypes": frozenset({torch.float32}), "min_capability": (0, 0)}
    monkeypatch.setitem(BACKENDS, "varlen", replace(BACKENDS["varlen"], attend=broken, second=wrong_heads, **cpu))
    with caplog.at_level("INFO"):
        assert choose_backend("auto", needs("gqa", head_size=16)) is BACKENDS["sdpa"]
    assert "; not varlen: broken: ValueError: Expect query" in caplog.text
    assert "wrong_heads: its output differs from attention by sdpa" in caplog.text
    with pytest.raises(ConfigError, match="varlen cannot be used: varlen: broken: ValueError"):
        choose_backend("varlen", needs("gqa", head_size=16))

    def repeated(*given):
        return attend_sdpa(*given)

    monkeypatch.setitem(BACKENDS, "varlen", replace(BACKENDS["varlen"], second=repeated))
    with caplog.at_level("INFO"):
        assert choose_backend("auto", needs("gqa", head_size=16)).attend is repeated
    assert caplog.messages[-1].startswith("Attention: varlen (repeated); not flash_attention_3: it runs on ['cuda']")
    assert "; not broken: ValueError" in caplog.messages[-1]
