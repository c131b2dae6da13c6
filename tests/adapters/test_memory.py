"""How many tokens fit into memory, against what autograd really keeps."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from lorica.adapters import memory
from lorica.adapters.memory import fitting_tokens, pass_tokens
from lorica.testing.models import adapted_model

WIDE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "attn_implementation": "sdpa",
}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**WIDE)),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=99, n_embd=64, n_layer=3, n_head=2, pad_token_id=0, attn_implementation="sdpa"
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE)),
}
HEADS = {"bert": "classifier", "gpt2": "score", "llama": "lm_head"}


@pytest.mark.parametrize("name", MODELS)
def test_what_autograd_keeps_fits_and_is_not_a_small_part_of_it(name: str) -> None:
    model = adapted_model(MODELS[name](), 0, 2, HEADS[name])
    ids = torch.randint(1, 99, (4, 32))
    frozen = {parameter.untyped_storage().data_ptr() for parameter in model.peft_model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # As the hooks of the per-example gradients do: the graph starts at the first adapted map.
    first = model.tensors[model.sites[0].a].module
    handle = first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    model.peft_model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model.peft_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    handle.remove()
    assert logits.requires_grad
    needed = sum(kept.values())
    assert fitting_tokens(model.peft_model, 3 * needed) >= 128
    assert fitting_tokens(model.peft_model, needed) <= 128


def test_the_default_follows_the_memory_that_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(MODELS["bert"](), 0, 2, "classifier").peft_model
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    gpu = torch.device("cuda")

    def default(total: int) -> int:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
        return pass_tokens(None, model, gpu)

    assert default(weights + 2 * 10**8) == fitting_tokens(model, 10**8) > 1
    assert default(2**40) == memory.MOST
    assert default(weights) == default(weights - 1) == 1
    assert pass_tokens(7, model, gpu) == pass_tokens(7, model, torch.device("cpu")) == 7
    assert pass_tokens(None, model, torch.device("cpu")) == memory.ON_CPU
    # Values of half the size take half the memory.
    before = fitting_tokens(model, 10**8)
    assert fitting_tokens(model.bfloat16(), 10**8) in (2 * before, 2 * before + 1)
