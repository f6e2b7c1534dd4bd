"""ML-Mamba in JAX: a vision-language model with linear cost in sequence length.

    from ml_mamba_jax import Chat, load

    model, params, tokenizer = load("runs/demo")
    chat = Chat(model, params, tokenizer)
    chat.ask("What is in the picture?", "cat.png")

Public names are imported when they are first used, so that `import ml_mamba_jax` costs nothing.
"""

import importlib

__version__ = "0.1.0"

# No public name may also be the name of a module here: importing that module would put it in the name's place.
_MODULE_OF = {
    "Chat": "conversation",
    "InputError": "errors",
    "CheckpointError": "errors",
    "NonFiniteError": "errors",
    "MLMamba": "model",
    "MLMambaConfig": "config",
    "MambaState": "state",
    "Sampling": "sampling",
    "Timing": "timing",
    "Tokenizer": "tokenizer",
    "Turn": "prompt",
    "answer_probabilities": "generation",
    "fork": "state",
    "generate": "generation",
    "generate_tokens": "decoding",
    "image_state": "generation",
    "join": "state",
    "load": "checkpoint",
    "load_config": "checkpoint",
    "load_params": "checkpoint",
    "load_state": "state_file",
    "prepare_images": "image",
    "quantize": "quantization",
    "read_image": "image",
    "save_state": "state_file",
    "stream": "generation",
    "take_rows": "state",
}

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_MODULE_OF))}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
