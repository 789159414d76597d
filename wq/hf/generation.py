"""What `generate` needs to be told so that decoding is compiled on every device."""

from __future__ import annotations

import torch
from transformers import CompileConfig

from wq.machine import default_device


def compile_config(*, final: bool = False) -> CompileConfig:
    """For `generate(..., cache_implementation="static", compile_config=wq.compile_config())`.

    transformers compiles decoding with a static cache by itself on accelerators; on a CPU it has to be told to. There,
    calls between kernels are compiled to C++, too, of which a small model has many for each token. Needs what
    torch.compile needs: on a CPU, a C++ compiler.

    final: the caller's word that the model's modules stay as they are from now on: no adapter, no other dtype, no other
    layout. On a CPU, what is compiled is then not checked against them before each token, which takes a millisecond for
    a few hundred layers. Whoever breaks that word gets the old model's answers.
    """
    config = CompileConfig()
    vars(config)["_compile_all_devices"] = True  # transformers has no public name for it
    if default_device() == "cpu":
        vars(config)["mode"] = None  # "reduce-overhead" is for GPUs, and goes with no options
        config.options = {"cpp_wrapper": True}
        if final:
            config.options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    return config
