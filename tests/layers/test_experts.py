"""Packed experts: they index as the dense parameter did, and run as one product that agrees with transformers' own.

Triton decides when it is imported whether it interprets, so the fused kernel runs in a process of its own: this file
as a script, all cases in one go.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import run_script
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import wq.hf  # registers the implementation
from wq.formats import compressed_tensors
from wq.layers import ExpertWeight
from wq.layers import experts as packed_experts
from wq.scheme import PER_CHANNEL, Scheme
from wq.solvers import Solution, rtn

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = 4
SCHEME = Scheme(4, 32, False, "float32")
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of a product after another

# out, in, group size. In tiles, rows are padded to 16 and columns to 64, 128 or 256: all, some or none of them here.
SHAPES = [(40, 96, 32), (33, 64, 64), (7, 40, PER_CHANNEL), (1, 33, PER_CHANNEL), (16, 512, 128), (48, 320, 64)]

_COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON |= {"vocab_size": 99, "head_dim": 16}
# Config and scheme. gpt-oss: biases, weights [experts, in, out], gate and up interleaved.
MODELS: dict[str, tuple[Callable[[], PretrainedConfig], Scheme]] = {
    "mixtral": (
        lambda: MixtralConfig(**_COMMON, intermediate_size=96, num_local_experts=EXPERTS),
        SCHEME,
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeConfig(
            **_COMMON, intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2
        ),
        Scheme(8, PER_CHANNEL, True, "float32"),
    ),
    "gpt_oss": (
        lambda: GptOssConfig(**_COMMON, intermediate_size=96, num_local_experts=EXPERTS, num_experts_per_tok=2),
        Scheme(2, 32, False, "float32"),
    ),
}

each_width = pytest.mark.parametrize("bits", [2, 4, 8])
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
each_shape = pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
each_orientation = pytest.mark.parametrize("transposed", [False, True], ids=["out × in", "in × out"])
each_dtype = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
each_model = pytest.mark.parametrize("name", MODELS)


# --- what the tests are made of ---


def stream(
    scheme: Scheme, out_features: int = 40, in_features: int = 96, experts: int = EXPERTS
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Random weights as a checkpoint has them, and the same dense in float64, `[experts, out, in]`."""
    groups = scheme.groups(in_features)
    tensors, dense = [], []
    for _ in range(experts):
        codes = torch.randint(0, scheme.levels, (out_features, in_features), dtype=torch.uint8)
        scale = (torch.rand(out_features, groups) / scheme.levels + 1e-3).to(getattr(torch, scheme.scale_dtype))
        zero = torch.full((out_features, groups), scheme.midpoint, dtype=torch.uint8)
        if not scheme.symmetric:
            zero = torch.randint(0, scheme.levels, zero.shape, dtype=torch.uint8)
        tensors.append(compressed_tensors.pack(Solution(codes, scale, zero, {}), scheme))
        spread = [values.repeat_interleave(in_features // groups, 1).double() for values in (scale, zero)]
        dense.append(spread[0] * (codes.double() - spread[1]))
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    return {n: torch.stack([t[n] for t in tensors]) if n in tensors[0] else None for n in names}, torch.stack(dense)


def make(
    scheme: Scheme = SCHEME, out_features: int = 40, in_features: int = 96, transposed: bool = False
) -> tuple[ExpertWeight, Tensor]:
    """A packed weight, and what indexing it must give, in float64."""
    tensors, dense = stream(scheme, out_features, in_features)
    weight = ExpertWeight.from_stream(*tensors.values(), in_features, scheme, transposed)
    return weight, dense.transpose(1, 2) if transposed else dense


def pack(weight: Tensor, scheme: Scheme, transposed: bool) -> ExpertWeight:
    """A dense parameter of experts, rounded to nearest."""
    dense = weight.detach().transpose(1, 2) if transposed else weight.detach()
    solutions = [rtn.solve(expert.float().contiguous(), None, scheme) for expert in dense]
    parts = [compressed_tensors.pack(solution, scheme) for solution in solutions]
    names = ["weight_packed", "weight_scale"] + ([] if scheme.symmetric else ["weight_zero_point"])
    tensors = {name: torch.stack([part[name] for part in parts]) for name in names}
    zero = tensors.get("weight_zero_point")
    return ExpertWeight.from_stream(
        tensors["weight_packed"], tensors["weight_scale"], zero, dense.shape[2], scheme, transposed
    )


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "is_transposed")]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a router and experts."""
    return [module for module in model.modules() if hasattr(getattr(module, "experts", None), "is_transposed")]


def dense_model(name: str) -> nn.Module:
    """A random model whose experts weigh as much as the rest, biases included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][0]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def packed_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """That model with packed experts."""
    model = dense_model(name)
    for module in experts_of(model):
        for projection in ("gate_up_proj", "down_proj"):
            packed = pack(getattr(module, projection), MODELS[name][1], module.is_transposed)
            delattr(module, projection)
            setattr(module, projection, packed)
    return model.to(dtype)


def use(model: nn.Module, implementation: str) -> nn.Module:
    model.config._experts_implementation = implementation
    return model


def routing(experts: int, tokens: int = 13, slots: int = 2) -> tuple[Tensor, Tensor]:
    """Different experts for each token and what each weighs."""
    return torch.rand(tokens, experts).topk(slots).indices, torch.rand(tokens, slots)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def no_indexing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from there on a packed weight cannot be dequantized by indexing."""

    def refuse(self: ExpertWeight, index: Any) -> Tensor:
        raise AssertionError("a packed weight was indexed")

    return lambda: monkeypatch.setattr(ExpertWeight, "__getitem__", refuse)


# --- in the place of a parameter ---


@each_orientation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_it_answers_for_the_parameter_it_replaces(transposed: bool, dtype: str) -> None:
    weight, dense = make(Scheme(4, 32, False, dtype), 40, 96, transposed)
    assert weight.shape == dense.shape == ((EXPERTS, 96, 40) if transposed else (EXPERTS, 40, 96))
    assert weight.dtype == getattr(torch, dtype)
    assert weight.device == torch.device("cpu")
    assert [p.requires_grad for p in weight.parameters()] == [False] * 3
    assert ("40" in repr(weight), "96" in repr(weight)) == (True, True)


INDICES: dict[str, Any] = {
    "the first": 0,
    "the last": -1,
    "a slice": slice(1, 3),
    "every other": slice(None, None, 2),
    "all": slice(None),
    "a scalar tensor": torch.tensor(2),
    "one id": torch.tensor([3]),
    "ids, some twice": torch.tensor([2, 0, 2, 3]),
    "int32 ids": torch.tensor([1, 3], dtype=torch.int32),
    "rows of ids": torch.tensor([[0, 1], [3, 1]]),
    "a list": [3, 0],
    "a mask": torch.tensor([True, False, False, True]),
    "none": slice(0, 0),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@each_orientation
def test_an_index_gives_what_it_gives_of_the_dense_weight(index: Any, transposed: bool) -> None:
    weight, dense = make(transposed=transposed)
    actual = weight[index]
    assert actual.dtype == weight.dtype
    assert torch.equal(actual, dense[index].float())


@pytest.mark.parametrize("index", [EXPERTS, -EXPERTS - 1, torch.tensor([0, EXPERTS])], ids=str)
def test_an_index_out_of_range_is_an_error(index: Any) -> None:
    weight, _ = make()
    with pytest.raises(IndexError, match=f"out of (bounds|range) for .*{EXPERTS}"):
        weight[index]


@each_width
@each_grid
@each_shape
def test_from_a_checkpoint_and_back_no_bit_changes(
    bits: int, symmetric: bool, out_features: int, in_features: int, group_size: int
) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    tensors, dense = stream(scheme, out_features, in_features)
    weight = ExpertWeight.from_stream(*tensors.values(), in_features, scheme)
    assert torch.equal(weight[:], dense.to(torch.float16))
    for expert in range(EXPERTS):
        for name, actual in zip(tensors, weight.stream(expert), strict=True):
            expected = None if tensors[name] is None else tensors[name][expert]
            if expected is None:
                assert actual is None
                continue
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("scheme", [Scheme(4, 48), Scheme(4, 16)], ids=str)
def test_what_does_not_fit_into_tiles_is_refused(scheme: Scheme) -> None:
    tensors, _ = stream(scheme)
    with pytest.raises(ValueError, match=f"no weight of {scheme.bits} bits with {96 // scheme.group_size} groups"):
        ExpertWeight.from_stream(*tensors.values(), 96, scheme)


def test_a_cast_of_the_model_leaves_codes_and_zero_points_alone() -> None:
    weight, dense = make(Scheme(8, 32, False))
    (packed, _, zero), cast = weight.stream(1), weight.to(torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast.stream(1)[0], packed)
    assert torch.equal(cast.stream(1)[2], zero)
    assert error(cast[1], dense[1]) < 2**-8


# --- its product ---


@each_width
@each_grid
@each_shape
def test_linear_multiplies_each_row_by_the_weight_of_its_expert(
    bits: int, symmetric: bool, out_features: int, in_features: int, group_size: int
) -> None:
    weight, dense = make(Scheme(bits, group_size, symmetric), out_features, in_features)
    for slots in (1, 3):
        x, bias = torch.randn(7, in_features), torch.randn(EXPERTS, out_features)
        owners = torch.randint(0, EXPERTS, (7 * slots,))
        for own in (bias, None):
            y = weight.linear(x, owners, own)
            assert y.dtype == x.dtype
            for row, owner in enumerate(owners.tolist()):
                expected = dense[owner] @ x[row // slots].double()
                expected = expected if own is None else expected + own[owner].double()
                torch.testing.assert_close(y[row].double(), expected, rtol=1e-5, atol=1e-5)


@each_dtype
def test_rows_of_no_expert_here_are_zero(dtype: torch.dtype) -> None:
    weight, _ = make()
    owners = torch.tensor([0, -1, EXPERTS, 2, EXPERTS + 7, 1])
    y = weight.linear(torch.randn(6, 96).to(dtype), owners, torch.ones(EXPERTS, 40).to(dtype))
    assert y.dtype == dtype
    assert [bool(row.any()) for row in y] == [True, False, False, True, False, True]


def test_the_weight_may_be_used_the_other_way_round_and_linear_stays() -> None:
    tensors, dense = stream(SCHEME)
    x, owners = torch.randn(5, 96), torch.tensor([0, 3, 1, 1, 2])
    ways = [ExpertWeight.from_stream(*tensors.values(), 96, SCHEME, transposed) for transposed in (False, True)]
    products = [weight.linear(x, owners) for weight in ways]
    assert torch.equal(*products)
    expected = torch.einsum("rk,rnk->rn", x.double(), dense[owners])
    torch.testing.assert_close(products[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 2])
def test_the_gradient_of_linear_is_that_of_the_dense_weight(slots: int) -> None:
    weight, dense = make()
    owners = torch.randint(0, EXPERTS, (7 * slots,))
    owners[2] = -1
    x, grad = torch.randn(7, 96, requires_grad=True), torch.randn(7 * slots, 40)
    weight.linear(x, owners).backward(grad)
    expected = torch.zeros(7, 96, dtype=torch.float64)
    for row, owner in enumerate(owners.tolist()):
        if owner >= 0:
            expected[row // slots] += grad[row].double() @ dense[owner]
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


# --- the experts of a layer ---


@each_model
def test_logits_are_those_of_every_other_implementation(name: str, no_indexing: Callable[[], None]) -> None:
    model, tokens = packed_model(name), torch.randint(0, 99, (2, 7))
    with torch.no_grad():
        others = [use(model, other)(tokens).logits for other in ("eager", "batched_mm")]
        no_indexing()
        logits = use(model, "wq")(tokens).logits
    for expected in others:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@each_model
@each_dtype
def test_the_experts_are_as_close_to_the_exact_result_as_eager_ones(name: str, dtype: torch.dtype) -> None:
    model = packed_model(name, dtype)
    experts = experts_of(model)[0]
    x = torch.randn(13, 64).to(dtype)
    index, weights = routing(experts.num_experts)
    weights = weights.to(dtype)
    exact = copy.deepcopy(use(model, "eager")).double()
    expected = experts_of(exact)[0](x.double(), index, weights.double())
    eager = experts(x, index, weights)
    use(model, "wq")
    actual = experts(x, index, weights)
    assert (actual.dtype, actual.shape) == (eager.dtype, eager.shape)
    assert error(actual, eager) < ROUNDING[dtype]
    assert error(actual, expected) < max(1e-6, 1.2 * error(eager, expected))


@each_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_experts_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    experts = experts_of(use(packed_model(name, dtype), "wq"))[0]
    x, (index, weights) = torch.randn(13, 64).to(dtype), routing(experts.num_experts)
    one = torch.ones(13, 1, dtype=dtype)
    first, second = (experts(x, index[:, slot : slot + 1], one).float() for slot in (0, 1))
    for routed in (weights, weights.to(dtype)):  # routers give either
        expected = first * routed[:, :1].float() + second * routed[:, 1:].float()
        assert torch.equal(experts(x, index, routed), expected.to(dtype))


@each_model
def test_an_index_beyond_the_experts_contributes_nothing(name: str) -> None:
    model = use(packed_model(name), "wq")
    experts = experts_of(model)[0]
    index, weights = routing(experts.num_experts)
    away = torch.rand(index.shape) < 0.5
    expected = experts(torch.ones(13, 64), index, weights.masked_fill(away, 0.0))
    for elsewhere in (experts.num_experts, -1):
        actual = experts(torch.ones(13, 64), index.masked_fill(away, elsewhere), weights)
        torch.testing.assert_close(actual, expected)
    assert not experts(torch.ones(13, 64), torch.full_like(index, experts.num_experts), weights).any()


@each_model
def test_no_tokens_are_no_result(name: str) -> None:
    experts = experts_of(use(packed_model(name), "wq"))[0]
    y = experts(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert y.shape == (0, 64)


@use_experts_implementation(has_gate=False, has_bias=True, has_post_expert_norm=True)
class PlainExperts(nn.Module):
    """Experts without a gate, and with a norm after each: what no model above has."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.num_experts = EXPERTS
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, 96, 64) / 8)
        self.up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 96))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, 64, 96) / 8)
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, 64))
        self.act_fn = nn.SiLU()
        self.post_expert_norm = nn.LayerNorm(64)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for token, slot in torch.cartesian_prod(*map(torch.arange, top_k_index.shape)).tolist():
            e = int(top_k_index[token, slot])
            inner = self.act_fn(functional.linear(hidden_states[token], self.up_proj[e], self.up_proj_bias[e]))
            outer = self.post_expert_norm(functional.linear(inner, self.down_proj[e], self.down_proj_bias[e]))
            y[token] += outer * top_k_weights[token, slot]
        return y


def plain_experts() -> PlainExperts:
    """Packed ones."""
    module = PlainExperts(MODELS["mixtral"][0]()).requires_grad_(False)
    nn.init.normal_(module.post_expert_norm.bias)
    for projection in ("up_proj", "down_proj"):
        packed = pack(getattr(module, projection), SCHEME, False)
        delattr(module, projection)
        setattr(module, projection, packed)
    return module


def test_experts_without_a_gate_and_with_a_norm_after_each_agree_with_eager_ones() -> None:
    module, x, (index, weights) = plain_experts(), torch.randn(13, 64), routing(EXPERTS)
    expected = use(module, "eager")(x, index, weights)
    torch.testing.assert_close(use(module, "wq")(x, index, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, float("inf"), float("nan")])
def test_neither_a_norm_nor_a_weight_makes_something_of_an_expert_that_is_elsewhere(weight: float) -> None:
    module, x, (index, weights) = use(plain_experts(), "wq"), torch.randn(13, 64), routing(EXPERTS)
    expected = module(x, index[:, :1], weights[:, :1])
    index[:, 1], weights[:, 1] = EXPERTS, weight
    torch.testing.assert_close(module(x, index, weights), expected)


# --- gradients, compiled ---


@each_model
def test_gradients_for_the_input_are_those_of_eager_experts(name: str, no_indexing: Callable[[], None]) -> None:
    model = packed_model(name)
    embedded = model.get_input_embeddings()(torch.randint(0, 99, (2, 7)))

    def gradient(implementation: str) -> Tensor:
        leaf = embedded.clone().requires_grad_()
        use(model, implementation)(inputs_embeds=leaf).logits.square().sum().backward()
        return leaf.grad

    expected = gradient("eager")
    no_indexing()
    assert expected.abs().max() > 1e-2
    assert error(gradient("wq"), expected) < 1e-5


@each_model
def test_gradients_for_the_router_are_those_of_eager_experts(name: str) -> None:
    model = packed_model(name)
    experts = experts_of(model)[0]
    x, (index, weights) = torch.randn(13, 64), routing(experts.num_experts)
    grads = []
    for implementation in ("eager", "wq"):
        use(model, implementation)
        leaf = weights.clone().requires_grad_()
        experts(x, index, leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 1e-2
    assert error(grads[1], grads[0]) < 1e-5


@each_model
def test_a_model_compiles_to_one_graph(name: str) -> None:
    model, tokens = use(packed_model(name), "wq"), torch.randint(0, 99, (2, 7))
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = model(tokens).logits
        actual = torch.compile(model, fullgraph=True, backend=backend)(tokens).logits
    torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1
    products = [node for node in graphs[0].graph.nodes if "expert_linear" in str(node.target)]
    assert len(products) == 2 * model.config.num_hidden_layers


@each_model
@pytest.mark.parametrize("training", [False, True], ids=["inference", "gradients"])
def test_experts_compile_to_one_graph_for_all_numbers_of_tokens(name: str, training: bool) -> None:
    model = use(packed_model(name), "wq")
    experts = experts_of(model)[0]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend=counter, dynamic=True)
    first = 0
    for tokens in (5, 2, 3, 9, 33):
        index, weights = routing(experts.num_experts, tokens)
        leaves = [torch.full((tokens, 64), 0.5, requires_grad=training) for _ in range(2)]
        outputs = [run(leaf, index, weights) for run, leaf in zip((compiled, experts), leaves, strict=True)]
        torch.testing.assert_close(*outputs)
        if training:
            for y in outputs:
                y.square().sum().backward()
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        first = first or counter.frame_count  # torch starts anew once, for a float that gpt-oss's gate needs as such
    assert counter.frame_count == first


# --- inside transformers ---


@each_model
def test_dense_experts_take_the_grouped_implementation(name: str) -> None:
    model, tokens = dense_model(name), torch.randint(0, 99, (2, 7))
    calls = []
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return grouped(*args, **kwargs)

    with torch.no_grad():
        expected = use(model, "grouped_mm")(tokens).logits
        ALL_EXPERTS_FUNCTIONS["grouped_mm"] = counting
        try:
            logits = use(model, "wq")(tokens).logits
        finally:
            del ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    assert torch.equal(logits, expected)
    assert len(calls) == model.config.num_hidden_layers


def test_a_dense_repo_loads_with_the_implementation(tiny_model: Callable[..., Path]) -> None:
    tokens = torch.randint(0, 320, (2, 7))
    logits = []
    for implementation in ("eager", "wq"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), experts_implementation=implementation)
        assert model.config._experts_implementation == implementation
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert error(logits[1], logits[0]) < 1e-5


def test_it_goes_together_with_linears_quantized_on_load(tiny_model: Callable[..., Path]) -> None:
    tokens = torch.randint(0, 320, (2, 7))
    logits = []
    for implementation in ("eager", "wq"):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model("mixtral"), quantization_config=wq.hf.WqConfig(), experts_implementation=implementation
        )
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert error(logits[1], logits[0]) < 1e-5


def test_it_is_registered_under_its_name() -> None:
    assert packed_experts.IMPLEMENTATION == "wq"
    assert "wq" in ALL_EXPERTS_FUNCTIONS


# --- on the fused kernel, interpreted ---

INTERPRETED = [f"{name}-{dtype}" for name in MODELS for dtype in ("float16", "bfloat16")]


def interpret() -> dict[str, Any]:
    """For each model and dtype: how far its layers' experts are from eager ones, and how often the kernel ran."""
    from wq_kernels import Backend, registry, select

    registry.BACKENDS["fused"] = Backend(".fused", "tiled", ("cpu",))
    select.cache_clear()
    results: dict[str, Any] = {}
    for case in INTERPRETED:
        name, dtype = case.split("-")
        calls = _count()
        model, outputs = packed_model(name, getattr(torch, dtype)), {}
        torch.manual_seed(1)
        x = torch.randn(1, 13, 64).to(getattr(torch, dtype))
        for implementation in ("eager", "wq"):
            use(model, implementation)
            made = [block(x) for block in blocks_of(model)]
            outputs[implementation] = [y[0] if isinstance(y, tuple) else y for y in made]
            results.setdefault(case, {})[implementation] = len(calls)
        pairs = zip(outputs["wq"], outputs["eager"], strict=True)
        results[case]["errors"] = [error(actual, expected) for actual, expected in pairs]
    return results


def _count() -> list[str]:
    """Launches of the experts kernel from now on."""
    from wq_kernels import experts

    calls: list[str] = []
    real = experts._experts_kernel

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            calls.append(str(grid))
            return real[grid]

    experts._experts_kernel = Counting()
    return calls


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_script(__file__, tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", INTERPRETED)
def test_a_whole_layer_on_the_fused_kernel_agrees_with_eager_experts(case: str, interpreted: dict[str, Any]) -> None:
    result = interpreted[case]
    assert result["eager"] == 0
    assert result["wq"] == 4  # two layers, two products
    assert len(result["errors"]) == 2
    assert max(result["errors"]) < ROUNDING[getattr(torch, case.split("-")[1])]


if __name__ == "__main__":
    print(json.dumps(interpret()))
