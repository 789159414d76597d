"""How vLLM, SGLang and transformers (without wq) come to take or refuse a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from wq.formats import compressed_tensors
from wq.formats.stored import Stored
from wq.loaders import kernels
from wq.loaders.config import excluded, groups, names_head, width
from wq.loaders.joined import EXPERT, joined
from wq.loaders.kernels import MARLIN_GROUPS, Kernel, Layer, either
from wq.scheme import PER_CHANNEL

_BLOCK = re.compile(r"\.\d+\.")
_UNSTABLE = ("gemma2", "gemma3", "gemma3_text", "glm4")  # model types that vLLM does not run in float16
_CONVERT = "Convert it: wq convert IN OUT --to compressed-tensors."

Grid = tuple[int, int, bool]  # bits, group size, symmetric


@dataclass(frozen=True)
class Checkpoint:
    """What decides, all by on-disk name.

    config: the whole config.json. layers: how each packed matrix is stored. dense: modules with a dense matrix that
    could have been packed. whole, dense_whole: packed and dense experts that lie there as one 3-D tensor.
    """

    config: Mapping[str, Any]
    layers: Mapping[str, Stored]
    dense: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    dense_whole: frozenset[str] = frozenset()

    @property
    def said(self) -> Mapping[str, Any]:
        """Its `quantization_config`."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, Mapping) else {}

    @property
    def method(self) -> str:
        return str(self.said.get("quant_method"))

    def grid(self, name: str) -> Grid:
        """Bits, group size and symmetry of a packed matrix as loaders see them: the config decides what is open."""
        stored, said = self.layers[name], self.said
        size = stored.scheme.group_size
        declared = [weights.get("group_size") for weights in compressed_tensors.declared_weights(said, name)]
        if size == PER_CHANNEL and stored.shape[1] in (*declared, said.get("group_size")):
            size = stored.shape[1]  # one group that fills the row
        symmetric = stored.scheme.symmetric
        if self.method != "compressed-tensors":
            symmetric = said.get("sym") is True or said.get("zero_point") is False
        return stored.scheme.bits, size, symmetric


@dataclass
class Verdict:
    """Reasons gathered against one loader; those that are alike in many blocks become one."""

    checkpoint: Checkpoint
    found: dict[tuple[str, str, str, str], list[str]] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def refuse(self, where: str, problem: str, measured: str, hint: str) -> None:
        self.found.setdefault((_BLOCK.sub(".*.", where), problem, measured, hint), []).append(where)

    def reasons(self) -> list[dict[str, str]]:
        """Each `{where, problem, measured, hint}`."""
        return [
            {"where": _and_more(names), "problem": problem, "measured": measured, "hint": hint}
            for (_, problem, measured, hint), names in self.found.items()
        ]


def _and_more(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# --- layers as vLLM and SGLang multiply them ---


def _packed_layers(verdict: Verdict, who: str) -> Iterator[Layer]:
    """Joined layers that are packed on one grid; those that are half dense, or on several, are refused."""
    checkpoint = verdict.checkpoint
    for name, parts in joined({*checkpoint.layers, *checkpoint.dense}).items():
        grids = {part: checkpoint.grid(part) if part in checkpoint.layers else None for part in parts}
        (first, *others) = grids.values()
        if any(grid != first for grid in others):
            told = ", ".join(f"{part.rpartition('.')[2]} {_words(grid)}" for part, grid in grids.items())
            what = f"{who} joins its parts into one layer, and they are not stored alike"
            verdict.refuse(name, what, told, "Quantize all of its parts in one scheme, or keep all of them.")
        elif first is not None and _finds(verdict, who, name, parts, first[0]):
            rows = sum(checkpoint.layers[part].shape[0] for part in parts)
            yield Layer(name, *first, rows, checkpoint.layers[parts[0]].shape[1])


def _finds(verdict: Verdict, who: str, name: str, parts: tuple[str, ...], bits: int) -> bool:
    """Whether the config gives a joined layer its width under the name that it is looked up by."""
    said = width(verdict.checkpoint.said, name, parts, class_first=who == "SGLang")
    if said not in (None, bits):
        what = f"{who} looks it up under this name, and the config gives that another width"
        verdict.refuse(name, what, f"{said} bits said, {bits} stored", "Convert it with wq, which writes all names.")
    return said in (None, bits)


def _words(grid: Grid | None) -> str:
    if grid is None:
        return "dense"
    bits, group, symmetric = grid
    where = "whole rows" if group == PER_CHANNEL else f"groups of {group}"
    return f"{bits} bits {'symmetric' if symmetric else 'asymmetric'} in {where}"


def _ask(verdict: Verdict, asked: Iterable[Kernel], layers: Iterable[Layer], who: str) -> None:
    """Refuse every layer that no kernel of a GPU takes; note for each kernel the first layer that it does not take."""
    asked = tuple(asked)
    for kernel in asked:
        verdict.kernels.setdefault(kernel.label, "")
    for layer in layers:
        refusals = {kernel: kernel.refusal(layer) for kernel in asked}
        for kernel, refusal in refusals.items():
            if refusal and not verdict.kernels[kernel.label]:
                verdict.kernels[kernel.label] = f"{layer.name}: {refusal}"
        gpu = {kernel.name: refusal for kernel, refusal in refusals.items() if kernel is not kernels.CPU}
        if all(gpu.values()):
            usual = layer.bits == 4 and layer.group in MARLIN_GROUPS
            hint = "Keep it dense with --keep." if usual else "Use 4 bits, symmetric, in groups of 32, 64 or 128."
            told = "; ".join(f"{name}: {refusal}" for name, refusal in gpu.items())
            verdict.refuse(layer.name, f"no kernel of {who} multiplies it", told, hint)


def _serving(verdict: Verdict, who: str, is_told: Callable[[Mapping[str, Any], str, tuple[str, ...]], bool]) -> None:
    """What vLLM and SGLang share: the layout, and that the config must tell them what is dense and what is not."""
    checkpoint, said = verdict.checkpoint, verdict.checkpoint.said
    if checkpoint.method == "compressed-tensors" and said.get("format") != "pack-quantized":
        told = f"format {said.get('format')!r}"
        verdict.refuse("config.json", f"{who} takes integer weights as pack-quantized", told, "Write that format.")
    stacks = {_stack(name) for name in checkpoint.layers}
    for name, parts in joined({*checkpoint.layers, *checkpoint.dense}).items():
        dense = not any(part in checkpoint.layers for part in parts)
        if dense and _stack(name) in stacks and not is_told(said, name, parts):
            what = f"it is dense, and the config does not tell {who} so"
            hint = "Use --format compressed-tensors, or quantize it too."
            verdict.refuse(name, what, "no entry under the name that it is looked up by", hint)
    for name, stored in checkpoint.layers.items():
        if "aligned" in stored.variant or "int8" in stored.variant:
            what = f"{who} does not read how older compressed-tensors packed it"
            verdict.refuse(name, what, stored.variant, "Convert it: wq convert IN OUT --to gptq, and back.")
        if name.rpartition(".")[2] == "lm_head" and not names_head(said, name):
            what = f"it is packed, and the config does not tell {who} so"
            verdict.refuse(name, what, "no target or flag names it", "Keep lm_head dense.")


def _stack(name: str) -> str:
    """The list of blocks a module is in. One of dense blocks only, a vision tower, is built without quantization."""
    return _BLOCK.split(name, maxsplit=1)[0]


def _act_order(verdict: Verdict, who: str, refused: tuple[str, ...]) -> None:
    for name, group in groups(verdict.checkpoint.said).items():
        weights = group.get("weights")
        order = weights.get("actorder") if isinstance(weights, Mapping) else None
        if order in refused:
            what = f"{who} does not load columns in this order"
            verdict.refuse(f"config.json, {name}", what, f"actorder {order!r}", "Quantize with static order, or none.")


def _column_order(verdict: Verdict, who: str, read: bool) -> None:
    """Columns in another order, which nobody but `g_idx` tells; read: whether the loader looks at it."""
    for name, stored in verdict.checkpoint.layers.items():
        if stored.permuted and not read:
            what = f"{who} does not look at g_idx, and its columns are in another order"
            verdict.refuse(name, what, "act-order", "Quantize with the columns in order.")


def _gptq_grids(verdict: Verdict, who: str) -> None:
    said = verdict.checkpoint.said
    bits, symmetric, group = said.get("bits"), said.get("sym"), said.get("group_size")
    if bits not in (4, 8) or symmetric is not True:
        what = f"{who} takes gptq of 4 or 8 bits, symmetric"
        verdict.refuse("config.json", what, f"bits {bits}, sym {symmetric}", _CONVERT)
    if group not in MARLIN_GROUPS:
        what = f"{who} takes gptq in groups of {either(MARLIN_GROUPS)}"
        verdict.refuse("config.json", what, f"group_size {group}", _CONVERT)
    for name in verdict.checkpoint.layers:
        own = verdict.checkpoint.grid(name)
        if own[0] not in (4, 8, bits) or own[1] not in (*MARLIN_GROUPS, group):
            what = f"{who} takes gptq of 4 or 8 bits in groups of {either(MARLIN_GROUPS)}"
            verdict.refuse(name, what, _words(own), _CONVERT)


# --- experts ---


def _expert_modules(checkpoint: Checkpoint) -> dict[str, tuple[list[str], list[str]]]:
    """Modules of experts with one matrix each on disk: their packed and their dense matrices."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for place, names in enumerate((checkpoint.layers, checkpoint.dense)):
        for name in sorted(names):
            if match := EXPERT.match(name):
                found.setdefault(match["experts"], ([], []))[place].append(name)
    return found


def _experts(verdict: Verdict, who: str) -> Iterator[tuple[str, list[str]]]:
    """Modules of packed experts that can be joined, and their matrices; the others are refused."""
    checkpoint, said = verdict.checkpoint, verdict.checkpoint.said
    untold = f"its experts are dense, and the config does not tell {who} so"
    for name in sorted(checkpoint.whole):
        what = f"{who} reads one packed matrix for each expert, not a 3-D tensor"
        verdict.refuse(name, what, "3-D on disk", "Load it with wq, or quantize with --keep experts.")
    for name in sorted(checkpoint.dense_whole):
        module, _, leaf = name.rpartition(".")
        looked_up = f"{module}.0.{leaf}" if checkpoint.method == "compressed-tensors" else module
        if not excluded(said, looked_up):
            verdict.refuse(name, untold, f"no entry for {looked_up}", "Name it in the config's list of dense modules.")
    for module, (packed, dense) in _expert_modules(checkpoint).items():
        grids = {checkpoint.grid(name) for name in packed}
        if (packed and dense) or len(grids) > 1:
            told = f"{len(packed)} packed on {len(grids)} grids, {len(dense)} dense"
            what = f"{who} joins all experts, and they are not stored alike"
            verdict.refuse(module, what, told, "Quantize all experts in one scheme, or keep all of them.")
        elif packed:
            by_part = checkpoint.method == "compressed-tensors"  # of one expert
            names = {name.rpartition(".")[2]: name for name in packed[::-1]}.values() if by_part else [module]
            if all(_finds(verdict, who, name, (name,), next(iter(grids))[0]) for name in names):
                yield module, packed
        elif checkpoint.method != "compressed-tensors" and not excluded(said, module):
            verdict.refuse(module, untold, f"no entry for {module}", "Use --format compressed-tensors.")


def _vllm_experts(verdict: Verdict) -> None:
    """Marlin takes experts of its grids whose hidden size is a multiple of 128; all other kernels want groups."""
    checkpoint = verdict.checkpoint
    for module, packed in _experts(verdict, "vLLM"):
        bits, group, symmetric = checkpoint.grid(packed[0])
        columns = {name.rpartition(".")[2]: checkpoint.layers[name].shape[1] for name in packed}
        hidden = max((size for leaf, size in columns.items() if leaf not in ("down_proj", "w2")), default=0)
        marlin = bits in ((4, 8) if symmetric else (4,)) and group in MARLIN_GROUPS and hidden % 128 == 0
        if group == PER_CHANNEL and not marlin and checkpoint.method == "compressed-tensors":
            what = "vLLM multiplies experts with one scale a row by Marlin only, in multiples of 128 columns"
            told = f"{_words((bits, group, symmetric))}, hidden size {hidden}"
            verdict.refuse(module, what, told, "Quantize in groups.")


# --- the loaders ---


def _vllm(verdict: Verdict) -> None:
    checkpoint, said = verdict.checkpoint, verdict.checkpoint.said
    _serving(verdict, "vLLM", _told_to_vllm)
    if checkpoint.method == "gptq":
        _gptq_grids(verdict, "vLLM")
        if said.get("desc_act") is True and said.get("group_size") != PER_CHANNEL:
            hint = "Quantize with the columns in order (desc_act false)."
            verdict.refuse("config.json", "vLLM has dropped act-order in groups", "desc_act true", hint)
    _act_order(verdict, "vLLM", ("group", "dynamic"))
    _column_order(verdict, "vLLM", read=False)
    if checkpoint.config.get("model_type") in _UNSTABLE:
        verdict.notes.append("runs this model in bfloat16, and rounds scales of another dtype to it")
    asked = kernels.VLLM_AWQ if checkpoint.method == "awq" else kernels.VLLM
    _ask(verdict, asked, _packed_layers(verdict, "vLLM"), "vLLM")
    _zero_words(verdict)
    _vllm_experts(verdict)


def _told_to_vllm(said: Mapping[str, Any], name: str, parts: tuple[str, ...]) -> bool:
    """vLLM tells gptq's dense layers by their dtypes; others by the config, under the joined name or all parts'."""
    if said.get("quant_method") == "gptq":
        return True
    return excluded(said, name) or all(excluded(said, part) for part in parts)


def _zero_words(verdict: Verdict) -> None:
    """Zero points are packed along the rows: parts are joined word by word, so each must fill its words."""
    layers = verdict.checkpoint.layers
    for name, parts in joined(layers).items():
        bits, _, symmetric = verdict.checkpoint.grid(parts[0])
        rows = {part.rpartition(".")[2]: layers[part].shape[0] for part in parts}
        if len(parts) > 1 and not symmetric and any(count * bits % 32 for count in rows.values()):
            what = "its parts' zero points are joined word by word, and one of them ends inside a word"
            told = ", ".join(f"{part} {count} rows" for part, count in rows.items())
            verdict.refuse(name, what, f"{bits} bits, {told}", "Quantize it symmetric.")


def _sglang(verdict: Verdict) -> None:
    checkpoint = verdict.checkpoint
    by_part = checkpoint.method == "compressed-tensors"
    _serving(verdict, "SGLang", _told_to_vllm if by_part else _told_whole)
    if checkpoint.method == "gptq":
        _gptq_grids(verdict, "SGLang")
    _act_order(verdict, "SGLang", ("dynamic",))
    _column_order(verdict, "SGLang", read=by_part or checkpoint.said.get("desc_act") is True)
    asked = kernels.SGLANG_AWQ if checkpoint.method == "awq" else kernels.SGLANG
    _ask(verdict, asked, _packed_layers(verdict, "SGLang"), "SGLang")
    for module, packed in _experts(verdict, "SGLang"):
        layers = set()
        for name in packed:
            rows, columns = checkpoint.layers[name].shape
            last = name.rpartition(".")[2] in ("down_proj", "w2")  # gate and up are joined
            layers.add(Layer(module, *checkpoint.grid(name), rows if last else 2 * rows, columns))
        _ask(verdict, kernels.SGLANG, sorted(layers, key=lambda layer: layer.rows), "SGLang")


def _told_whole(said: Mapping[str, Any], name: str, parts: tuple[str, ...]) -> bool:
    """SGLang looks for the joined name in gptq's and awq's lists."""
    return excluded(said, name)


def _transformers(verdict: Verdict) -> None:
    """Its quantizers replace `nn.Linear` only, and need packages of their own."""
    checkpoint = verdict.checkpoint
    packages = {"gptq": "optimum and gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed-tensors"}
    verdict.notes.append(f"needs {packages[checkpoint.method]}, or `import wq`")
    asymmetric = [name for name, stored in checkpoint.layers.items() if not stored.scheme.symmetric]
    if checkpoint.method == "compressed-tensors":
        verdict.notes.append("turns dense at the first forward pass without wq")
        if asymmetric:
            what = "transformers, by compressed-tensors 0.20, does not load packed zero points"
            hint = "Load it with wq, or quantize --symmetric."
            verdict.refuse(_and_more(asymmetric), what, f"{len(asymmetric)} asymmetric layers", hint)
    for module, (packed, _) in _expert_modules(checkpoint).items():
        if packed and checkpoint.method != "compressed-tensors":
            what = f"transformers leaves packed experts of {checkpoint.method} unread, and its own random"
            verdict.refuse(module, what, f"{len(packed)} packed matrices", "Load it with wq.")
    for name in sorted(checkpoint.whole):
        what = "transformers has no reader for 3-D packed experts"
        verdict.refuse(name, what, "3-D on disk", "Load it with wq.")


JUDGES: dict[str, Callable[[Verdict], None]] = {"transformers": _transformers, "vllm": _vllm, "sglang": _sglang}
