"""PEFT's other methods in a loop of one's own: LoRA with any loss, learned prompts where the loss calls the model."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import lm_batch, tiny_llama
from torch.nn.functional import cross_entropy

from adazeta import ZerothOrder
from adazeta.generation import generate_answers
from adazeta.losses import HeadScores, lm_loss

PREFIX = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
IA3 = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}


def through_the_model(model, batch):
    """Next-token loss of all tokens, from the forward that a learned prompt acts in."""
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
    return cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
@pytest.mark.parametrize(
    "config, loss",
    [
        (LoraConfig(**LORA), lm_loss),
        (IA3Config(**IA3), lm_loss),
        (LoraConfig(**LORA), through_the_model),
        (PrefixTuningConfig(**PREFIX), through_the_model),
        (PromptTuningConfig(**PREFIX), through_the_model),
    ],
    ids=["lora", "ia3", "lora-own", "prefix", "prompt"],
)
def test_it_learns(config, loss, perturb):
    torch.manual_seed(0)
    model, batch = get_peft_model(tiny_llama(1), config).eval(), lm_batch()
    optimizer, losses = ZerothOrder(model, queries=16, lr=0.1, eps=0.01, perturb=perturb), []
    for _ in range(25):
        losses.append(float(optimizer.estimate(loss, batch)))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01, losses


@pytest.mark.parametrize("config", [PrefixTuningConfig(**PREFIX), PromptTuningConfig(**PREFIX)])
def test_losses_that_would_not_see_a_learned_prompt_refuse_it(config):
    model, batch = get_peft_model(tiny_llama(1), config).eval(), lm_batch()
    calls = (
        lambda: ZerothOrder(model, queries=2).estimate(lm_loss, batch),
        lambda: HeadScores()(model, {**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.int64)}),
        lambda: generate_answers(model, None, batch, max_new_tokens=2),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"{type(config).__name__} acts in PeftModel.forward.*a loss of your own"):
            call()
