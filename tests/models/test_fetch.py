"""Models loaded from URIs equal those of the folder."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from medgpt.artifacts import Folder
from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.models import fetch
from medgpt.models.fetch import local_copy, run_model_folder
from medgpt.models.load import build_empty_model, build_model
from medgpt.models.lora import apply_lora
from medgpt.models.model_files import weight_files
from medgpt.models.tokenizer import load_tokenizer
from medgpt.stages.merge import merge_adapter
from tests.models.tiny_models import save_model_with_tokenizer

TEXTS = ["今天天气很好。The weather is fine today."] * 10

Store = Callable[[Path], str]


@pytest.fixture
def store() -> Iterator[Store]:
    """Yield `store(folder)`, which uploads a folder and returns its URI; remove all copies."""
    stored: list[str] = []

    def put(folder: Path) -> str:
        stored.append(f"memory://{uuid4().hex}/run/model")
        with Folder(stored[-1]).staging() as directory:
            shutil.copytree(folder, directory, dirs_exist_ok=True)
        return stored[-1]

    yield put
    for uri in stored:
        shutil.rmtree(in_another_process(uri))
        Folder(uri).remove()


def in_another_process(uri: str) -> Path:
    """Call `local_copy` in a new process, without its cache."""
    fetch._copy_to_cache.cache_clear()
    return Path(local_copy(uri))


def build(name: str):
    config = ModelConfig(name=name)
    return build_model(config, head_kind="clm", seed=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    save_model_with_tokenizer(folder, TEXTS, vocab_size=300)
    return folder


def test_a_model_behind_a_uri_is_the_one_that_was_put_there(saved: Path, store: Store) -> None:
    uri = store(saved)
    model, expected = build(uri), build(str(saved))
    for name, weight in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)
    assert load_tokenizer(uri).get_vocab() == load_tokenizer(str(saved)).get_vocab()
    (weights,) = weight_files(uri)
    assert weights.read_bytes() == (saved / "model.safetensors").read_bytes()


def test_a_copy_is_made_once_and_again_when_the_files_change(saved: Path, store: Store) -> None:
    uri = store(saved)
    first = Path(local_copy(uri))
    (first / "mark").touch()
    assert in_another_process(uri) == first
    assert (first / "mark").exists()  # not fetched a second time
    Folder(uri).write_text("config.json", "{}")
    second = in_another_process(uri)
    assert second != first
    assert (second / "config.json").read_text() == "{}"
    assert (first / "config.json").read_text() != "{}"
    shutil.rmtree(first)


def test_paths_ids_and_files_are_not_copied(saved: Path) -> None:
    assert local_copy(str(saved)) == str(saved)
    assert local_copy("owner/name") == "owner/name"
    assert local_copy(f"file://{saved}") == str(saved)
    assert run_model_folder(str(saved.parent)) == saved.parent
    assert run_model_folder(f"file://{saved}") == saved


def test_a_relative_run_has_an_absolute_model_folder(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a relative path with one slash would pass for a hub id
    monkeypatch.chdir(saved.parent.parent)
    assert run_model_folder(f"{saved.parent.name}/{saved.name}") == saved


def test_the_model_folder_of_a_remote_run_is_found(saved: Path, store: Store) -> None:
    uri = store(saved)
    assert (
        run_model_folder(uri)
        == run_model_folder(uri.removesuffix("/model"))
        == Path(local_copy(uri))
    )


def test_adapters_name_the_uri_of_their_base_and_merge_into_it(
    saved: Path, store: Store, tmp_path: Path
) -> None:
    uri = store(saved)
    adapted = apply_lora(build(uri), LoraConfig(rank=2))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    adapted.save_pretrained(tmp_path / "run")
    load_tokenizer(uri).save_pretrained(tmp_path / "run")
    assert uri in (tmp_path / "run" / "adapter_config.json").read_text("utf-8")
    merge_adapter(store(tmp_path / "run"), tmp_path / "out")
    merged, base = build(str(tmp_path / "out")), build(str(saved))
    layer = "model.layers.0.self_attn.q_proj.weight"
    change = merged.get_parameter(layer) - base.get_parameter(layer)
    assert float(change.detach().abs().max()) > 1e-3


def test_a_model_without_weights_names_the_uri_too(saved: Path, store: Store) -> None:
    uri = store(saved)
    model = build_empty_model(ModelConfig(name=uri), head_kind="clm")
    assert model.name_or_path == uri


@pytest.mark.parametrize("uri", ["memory://nothing/there", "nowhere://bucket/model"])
def test_an_error_for_a_uri_without_a_model_names_the_config_key(uri: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.name={uri}: the URI cannot be read \("):
        build(uri)
    with pytest.raises(ConfigError, match=rf"^RUN={uri}: the URI cannot be read \("):
        run_model_folder(uri)
