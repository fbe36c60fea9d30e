"""The tiny families are what their hub folders are: transformers alone reads, reacts and stops."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from tests.models.families import FAMILIES

TEXT = "糖尿病 the 罕见 blood."


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_a_family_whose_logits_depend_on_every_token(
    name: str, family_folder: Callable[[str], Path]
) -> None:
    family, folder = FAMILIES[name], family_folder(name)
    auto = AutoModelForMaskedLM if family.masked else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=family.remote_code)
    model = auto.from_pretrained(folder, trust_remote_code=family.remote_code).eval()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    swapped = ids.clone()
    swapped[0, 2] = 60

    with torch.no_grad():
        change = (model(ids).logits - model(swapped).logits)[0, -1].abs().max()

    assert change > 0.02
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
    if family.ends is not None:
        ends = tokenizer.convert_tokens_to_ids(list(family.ends))
        found = model.generation_config.eos_token_id
        assert ([found] if isinstance(found, int) else found) == ends
