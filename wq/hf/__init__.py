"""wq inside `from_pretrained`: the only room that knows transformers' quantizer API.

    AutoModelForCausalLM.from_pretrained(repo, quantization_config=WqConfig())

A dense repo is rounded to nearest while it loads. A gptq, awq, auto-round or compressed-tensors repo loads onto packed
layers and stays packed; `save_pretrained` writes it as it was. `WqConfig(dequantize=True)` gives an ordinary dense
model.

`config` is the flag, `quantizer` the hooks, `conversion` the tensors on their way, `head` the layer that makes logits,
where that is rounded, `takeover` the one function of transformers that is wrapped, `load` and `compile_config` helpers
for scripts.
"""

from wq.hf.config import WqConfig
from wq.hf.generation import compile_config
from wq.hf.loading import load
from wq.hf.quantizer import WqQuantizer
from wq.hf.takeover import takeover

__all__ = ["WqConfig", "WqQuantizer", "compile_config", "load", "takeover"]
