"""Python code that comes with a model: a Llama with its own class names, as a hub model has it."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel


class TinyConfig(LlamaConfig):
    model_type = "tiny_remote"


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig


class TinyForSequenceClassification(LlamaPreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
