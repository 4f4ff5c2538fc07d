"""The models of `bench_step.py`: configurations of known models with seeded random weights, and batches for them."""

from collections.abc import Callable
from dataclasses import dataclass

import accelerate
import torch
import transformers
from torch import nn

from adazeta_kernels import fill_normal_

#: Token ids of the mask and of the two label words; a batch's other tokens are above all special ones.
MASK, WORDS, LOWEST = 10, (11, 12), 16


def llama(width: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **settings):
    return transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        pad_token_id=0,
        **settings,
    )


def opt(width: int, layers: int, heads: int, vocabulary: int):
    return transformers.OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
    )


def roberta(width: int, layers: int, heads: int, vocabulary: int):
    return transformers.RobertaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
    )


@dataclass(frozen=True)
class Model:
    """A model's configuration, the same family in little for trial runs, and whether a CPU is enough."""

    config: Callable[[], transformers.PreTrainedConfig]
    little: Callable[[], transformers.PreTrainedConfig]
    gpu_only: bool = False


MODELS = {
    "roberta-large": Model(lambda: roberta(1024, 24, 16, 50265), lambda: roberta(64, 2, 4, 128)),
    "opt-125m": Model(lambda: opt(768, 12, 12, 50272), lambda: opt(64, 2, 4, 128)),
    "llama-12l": Model(lambda: llama(1024, 2816, 12, 16, 16, 32000), lambda: llama(64, 96, 2, 4, 4, 128)),
    "smollm2-135m": Model(
        lambda: llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True), lambda: llama(64, 96, 4, 4, 2, 128)
    ),
    "llama-2-7b": Model(
        lambda: llama(4096, 11008, 32, 32, 32, 32000), lambda: llama(64, 96, 2, 4, 4, 128), gpu_only=True
    ),
}


def build(name: str, dtype: torch.dtype, device: str = "cpu", little: bool = False, seed: int = 0) -> nn.Module:
    """Return the model `name` of `MODELS` with its language-model head, random weights of std .02, in eval mode."""
    config = (MODELS[name].little if little else MODELS[name].config)()
    masked = config.model_type == "roberta"
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    # Drawn by our own generator, for the models' initialisation takes longer than many a case.
    with accelerate.init_empty_weights(include_buffers=False):
        model = kind.from_config(config, dtype=dtype)
    offset = 0
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape)
            if values.ndim > 1:
                fill_normal_(values, seed, offset=offset).mul_(0.02)
                offset += values.numel()
            else:
                values.fill_(key == "weight")  # of a norm, or a bias
            setattr(module, key, nn.Parameter(values.to(dtype), requires_grad=False))
    model.tie_weights()
    return model.to(device).eval()


def make_batch(model: nn.Module, examples: int, tokens: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return `examples` rows of `tokens` real tokens with labels 0 and 1 in turn; the last is the mask, and scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(LOWEST, model.config.vocab_size, (examples, tokens), generator=generator)
    ids[:, -1] = MASK
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": torch.full((examples,), tokens - 1),
        "labels": torch.arange(examples) % 2,
    }
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
