"""What `generate` needs to be told so that decoding is compiled on every device."""

from __future__ import annotations

from transformers import CompileConfig


def compile_config() -> CompileConfig:
    """For `generate(..., cache_implementation="static", compile_config=wq.compile_config())`.

    transformers compiles decoding with a static cache by itself on accelerators; on a CPU it has to be told to. Needs
    what torch.compile needs: on a CPU, a C++ compiler.
    """
    config = CompileConfig()
    vars(config)["_compile_all_devices"] = True  # transformers has no public name for it
    return config
