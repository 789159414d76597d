"""What tokens count: against the whole model's own gradients, whatever the batches, parts and processes."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from wq import formats, solvers
from wq.pipeline import importance, quantizer
from wq.pipeline.flow import NotFiniteError
from wq.pipeline.plan import make_plan
from wq.pipeline.ranks import Ranks
from wq.pipeline.source import open_source
from wq.pipeline.statistics import Tap, collect_pairs
from wq.scheme import Scheme

CPU = torch.device("cpu")


def measured(folder, tokens, rows=None, seed=0):
    with open_source(folder, None, False) as source:
        plan = make_plan(source, formats.get("compressed-tensors"), Scheme(4, 32, True), False, (), None)
        tower, blocks = plan.towers[0]
        return importance.measure(source, tower, blocks, tokens, CPU, torch.float32, Ranks(), seed, rows)


def expected(folder, tokens, seed=0):
    """By one backward pass through the whole model for each window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    slopes, sizes = {}, {}

    def hook(name):
        def forward(module, args, out):
            sizes.setdefault(name, []).append(args[0].detach().square().sum(-1)[0])
            out.register_hook(lambda g: slopes.setdefault(name, []).append(g.square().sum(-1)[0]))

        return forward

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            module.register_forward_hook(hook(name))
    for number, window in enumerate(tokens):
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(seed + number)
        drawn = importance.draw(logits.detach().float().softmax(-1), generator)[:, 0]
        functional.cross_entropy(logits, drawn, reduction="sum").backward()
    found = {}
    for name in slopes:
        slope, size = torch.stack(slopes[name]), torch.stack(sizes[name])
        counts = slope / (slope * size).sum() + 1 / size.sum()
        found[name] = counts / counts.mean()
    return found


@pytest.fixture
def exact(monkeypatch):
    """Without products in bfloat16, which some processors have, nor hidden states that wait in it."""
    monkeypatch.setattr(importance, "HELD_DTYPE", torch.float32)
    monkeypatch.setattr(importance, "learning_dtype", lambda weight: weight.dtype)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "qwen3", "phi3"])
def test_is_the_square_of_the_whole_models_gradient(tmp_path, architecture, exact):
    folder = tiny_models.make(tmp_path / "m", architecture)
    tokens = torch.randint(5, 60, (5, 24))
    found, wanted = measured(folder, tokens), expected(folder, tokens)
    assert found
    for path, counts in found.items():
        assert counts.shape == tokens.shape
        torch.testing.assert_close(counts.double(), wanted[path], rtol=2e-3, atol=1e-5)
        assert float(counts.mean()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("change", [{"CACHED_TOKENS": 16}, {"CACHED_TOKENS": 48}, {"LOGITS": 1}, {"HELD_BYTES": 1}])
def test_is_the_same_in_other_batches_and_parts(tmp_path, monkeypatch, exact, change):
    """One window in a batch, or three; one token's logits; one window in a part."""
    folder = tiny_models.make(tmp_path / "m", "llama")
    tokens, sizes = torch.randint(5, 60, (7, 16)), []
    whole = measured(folder, tokens)
    monkeypatch.setattr(importance, "HELD_SHARE", 1 << 40)
    for name, value in change.items():
        monkeypatch.setattr(importance, name, value)
    run = importance._Part.run
    monkeypatch.setattr(importance._Part, "run", lambda self: sizes.append(self.flow.sizes) or run(self))
    for path, counts in measured(folder, tokens).items():
        torch.testing.assert_close(counts, whole[path], rtol=1e-3, atol=1e-5)
    batches = {16: [[1] * 7], 48: [[1, 3, 3]]}.get(change.get("CACHED_TOKENS"), [[1, 6]])
    assert sizes == ([[1]] * 7 if "HELD_BYTES" in change else batches)
    sizes.clear()
    measured(folder, tokens, rows=2)  # what there is memory for
    assert all(size <= 2 for part in sizes for size in part)


def test_another_seed_draws_other_tokens(tmp_path):
    folder = tiny_models.make(tmp_path / "m", "llama")
    tokens = torch.randint(5, 60, (4, 16))
    one, other = measured(folder, tokens), measured(folder, tokens, seed=100)
    assert all(not torch.equal(one[path], other[path]) for path in one)


def test_memory_that_runs_out_is_met_with_less(tmp_path, monkeypatch, exact):
    folder = tiny_models.make(tmp_path / "m", "llama")
    tokens = torch.randint(5, 60, (6, 16))
    whole, left = measured(folder, tokens), [2]
    back = importance._Part._back

    def failing(self, block, index):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return back(self, block, index)

    monkeypatch.setattr(importance._Part, "_back", failing)
    for path, counts in measured(folder, tokens).items():
        torch.testing.assert_close(counts, whole[path], rtol=1e-3, atol=1e-5)
    assert not left[0]


def test_windows_that_are_not_finite_are_named(tmp_path):
    folder = tiny_models.make(tmp_path / "m", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data[7] = torch.inf
    model.save_pretrained(folder)
    tokens = torch.randint(10, 60, (4, 16))
    tokens[2, 3] = 7
    with pytest.raises(NotFiniteError) as error:
        measured(folder, tokens)
    assert error.value.windows == [2]


def test_a_model_without_gradients_counts_all_tokens_alike(tmp_path, monkeypatch):
    folder = tiny_models.make(tmp_path / "m", "llama")

    def refused(*args):
        raise NotImplementedError("derivative for aten::something is not implemented")

    text = ["some words to learn from " * 400]
    options = {"group_size": 32, "calibration": text, "samples": 16, "seqlen": 16, "importance": True}
    without = quantizer.quantize(folder, tmp_path / "without", without=["importance"], **options)
    monkeypatch.setattr(importance._Part, "_back", refused)
    made = quantizer.quantize(folder, tmp_path / "q", **options)
    assert made["importance"] == {"layers": 0, "reason": "derivative for aten::something is not implemented"}
    assert without["importance"] is None
    assert "tokens count alike: derivative" in (tmp_path / "q" / "README.md").read_text()
    names = ["model.safetensors"]
    assert all((tmp_path / "q" / n).read_bytes() == (tmp_path / "without" / n).read_bytes() for n in names)


def test_a_row_of_encoders_and_one_of_decoders_counts_all_tokens_alike(tmp_path):
    made = quantizer.quantize(
        tiny_models.make(tmp_path / "m", "t5"),
        tmp_path / "q",
        group_size=32,
        calibration=["some words to learn from " * 400],
        samples=16,
        seqlen=16,
        importance=True,
    )
    assert made["importance"] == {"layers": 0, "reason": "the model has more than one row of blocks"}


def test_what_predicts_no_token_at_every_place_is_not_known(tmp_path, monkeypatch):
    folder = tiny_models.make(tmp_path / "m", "llama")
    predict = importance.decoder.predict
    monkeypatch.setattr(importance.decoder, "predict", lambda *args: predict(*args)[:, -1])  # as a classifier
    with pytest.raises(importance.UnknownImportanceError, match="does not predict a token at every place"):
        measured(folder, torch.randint(5, 60, (2, 16)))


def test_windows_that_are_not_finite_are_left_out_and_the_others_weighed(tmp_path, monkeypatch):
    folder = tiny_models.make(tmp_path / "m", "llama")
    measure, seen = importance.measure, []

    def spoiled(source, tower, blocks, windows, *where):
        seen.append(len(windows))
        if len(windows) == 24:
            raise NotFiniteError([3])
        return measure(source, tower, blocks, windows, *where)

    monkeypatch.setattr(importance, "measure", spoiled)
    options = {"group_size": 32, "calibration": ["some words to learn from " * 400], "samples": 24, "seqlen": 16}
    made = quantizer.quantize(folder, tmp_path / "q", importance=True, **options)
    assert seen == [24, 23]
    assert made["calibration"]["left_out"] == [3]
    assert made["importance"] == {"layers": len(made["layers"])}


def test_layers_of_a_mixture_are_weighed_and_its_experts_solved(tmp_path):
    options = {"group_size": 32, "calibration": ["some words to learn from " * 400], "samples": 16, "seqlen": 16}
    folder = tiny_models.make(tmp_path / "m", "mixtral")
    made = quantizer.quantize(folder, tmp_path / "q", importance=True, **options)
    attention = [layer for layer in made["layers"] if "self_attn" in layer["layer"]]
    assert made["importance"] == {"layers": len(attention)}
    assert len(attention) < len(made["layers"])


def test_tokens_are_drawn_as_often_as_they_are_likely():
    wanted = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0])
    drawn = importance.draw(wanted.repeat(20_000, 1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 1)
    torch.testing.assert_close(drawn[:, 0].bincount(minlength=5) / 20_000, wanted, rtol=0, atol=0.02)


def test_statistics_are_weighted_sums():
    """Each window's tokens by what they count, the drift too, against float64."""
    layer = torch.nn.Linear(8, 4, bias=False)
    q, x = torch.randn(16, 5, 8), torch.randn(16, 5, 8)
    counts = torch.rand(16, 5) * 3
    batches = lambda t: lambda number: layer(t[number * 8 : number * 8 + 8])  # noqa: E731
    taps = Tap(layer, None, batches(q)), Tap(layer, None, batches(x))
    weighed, plain = collect_pairs(*taps, [8, 8], Ranks(), 0, [counts, None])
    for found, weight in ((weighed, counts), (plain, torch.ones(16, 5))):
        for part, chosen in ((found, torch.arange(16) % 8 != 7), (found.heldout, torch.arange(16) % 8 == 7)):
            w = weight[chosen].double().reshape(-1, 1)
            a, b = q[chosen].double().reshape(-1, 8), x[chosen].double().reshape(-1, 8)
            torch.testing.assert_close(part.second_moment.double(), (a * w).T @ a / w.sum(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(part.drift.double(), ((b - a) * w).T @ a / w.sum(), rtol=1e-5, atol=1e-6)
            assert torch.equal(part.second_moment, part.second_moment.T)
            assert part.tokens == int(chosen.sum()) * 5


def test_only_gptq_can_use_it():
    assert importance.wanted(solvers.get("gptq"), True, ("sequence",))
    assert not importance.wanted(solvers.get("gptq"), False, ())
    assert not importance.wanted(solvers.get("gptq"), True, ("importance",))
    assert not importance.wanted(solvers.get("awq"), True, ())
    assert not importance.wanted(solvers.get("rtn"), True, ())


@pytest.mark.parametrize("without", [(), ("sequence",), ("target",)])
def test_layers_are_solved_with_what_tokens_count(tmp_path, without):
    """Other codes than where tokens count alike, in every order of learning; every layer of the model."""
    folder = tiny_models.make(tmp_path / "m", "llama")
    text = ["some words to learn from " * 400]
    options = {"group_size": 32, "calibration": text, "samples": 16, "seqlen": 16, "without": without}
    plain = quantizer.quantize(folder, tmp_path / "plain", **options)
    made = quantizer.quantize(folder, tmp_path / "weighed", importance=True, **options)
    assert plain["importance"] is None
    assert made["importance"] == {"layers": len(made["layers"])}
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "weighed"))
    packed = [name for name in one if name.endswith("weight_packed")]
    assert len(packed) == len(made["layers"])
    assert sum(not torch.equal(one[name], other[name]) for name in packed) > len(packed) // 2
    order = [layer["layer"] for layer in plain["layers"]]
    assert order == [layer["layer"] for layer in made["layers"]]


def test_what_was_found_is_noted_and_taken_up_again(tmp_path, monkeypatch):
    folder = tiny_models.make(tmp_path / "m", "llama")
    text = ["some words to learn from " * 400]
    options = {"group_size": 32, "calibration": text, "samples": 16, "seqlen": 16, "importance": True}
    quantizer.quantize(folder, tmp_path / "whole", **options)
    calls, stages = [], quantizer.Stages.run
    measure = importance.measure
    monkeypatch.setattr(importance, "measure", lambda *a, **k: calls.append(1) or measure(*a, **k))

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantizer.Stages, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantizer.quantize(folder, tmp_path / "q", **options)
    monkeypatch.setattr(quantizer.Stages, "run", stages)
    quantizer.quantize(folder, tmp_path / "q", **options)
    assert len(calls) == 1
    names = ("whole", "q")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1
