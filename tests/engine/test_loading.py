from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from medgpt.config.train import OptimizerConfig
from medgpt.engine import Engine
from medgpt.engine.export import export_weights, gather_weights
from medgpt.engine.loading import load_safetensors, partitioned_init
from medgpt.engine.setup import ensure_process_group
from tests.engine.cases import CPU, EngineSetup, new_engine, new_net, save, train_step
from tests.engine.ranks import start_ranks

TwoRanks = Callable[..., list[Any]]
QWEN = Qwen2Config(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
TOKENS = torch.arange(12)[None] % 7


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Qwen2 in several shards."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2ForCausalLM(QWEN).save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def read(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def read_partitioned(case: EngineSetup, folder: Path) -> Engine:
    with no_init_weights(), partitioned_init(case.config(), CPU):
        model = Qwen2ForCausalLM(QWEN)
    model.tie_weights()
    assert load_safetensors(model, sorted(folder.glob("*.safetensors"))) == ([], [])
    optimizer = OptimizerConfig()
    return Engine(
        model.eval(), engine=case.config(), optimizer=optimizer, total_steps=5, device=CPU
    )


def logits_of(case: EngineSetup, folder: Path) -> Tensor:
    engine = read_partitioned(case, folder)
    with torch.no_grad():
        return engine(input_ids=TOKENS).logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_streamed_model_has_the_logits_of_transformers(
    qwen: Path, stage: int, precision: str
) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with torch.no_grad():
        expected = read(qwen, dtype)(input_ids=TOKENS).logits
    assert torch.equal(logits_of(EngineSetup(stage, precision=precision), qwen), expected)


def test_partitioned_loading_on_two_ranks_gives_the_same_model(
    qwen: Path, two_ranks: TwoRanks
) -> None:
    with torch.no_grad():
        expected = read(qwen)(input_ids=TOKENS).logits
    for found in two_ranks(logits_of, EngineSetup(3), qwen):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def rotary_frequencies(case: EngineSetup, folder: Path) -> Tensor:
    return dict(read_partitioned(case, folder).module.named_buffers())["model.rotary_emb.inv_freq"]


def test_rotary_frequencies_stay_fp32_in_a_partitioned_bf16_model(qwen: Path) -> None:
    found = rotary_frequencies(EngineSetup(3, precision="bf16"), qwen)
    # base 10000, head size 4: 1 and 10000^-0.5
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([1, 0.01], rel=1e-6)


def train_and_export(case: EngineSetup, base: Path, folder: Path) -> tuple[Tensor, list[str]]:
    """Train one step and export; return the logits and the exported names of this rank."""
    engine = read_partitioned(case, base)
    engine.backward(
        cross_entropy(engine(input_ids=TOKENS).logits[0].float(), TOKENS[0]) / dist.get_world_size()
    )
    engine.step()
    export_weights(engine.module, folder)
    with torch.no_grad():
        logits = engine(input_ids=TOKENS).logits
    return logits, [name for name, _ in gather_weights(engine.module)]


@pytest.mark.parametrize(
    "case", [EngineSetup(0), EngineSetup(3), EngineSetup(1, precision="bf16")], ids=str
)
def test_transformers_loads_an_export_with_equal_logits(
    qwen: Path, tmp_path: Path, case: EngineSetup
) -> None:
    logits, names = train_and_export(case, qwen, tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(names)
    assert "lm_head.weight" not in names  # tied
    QWEN.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(tmp_path, logits.dtype)(input_ids=TOKENS).logits, logits)


def test_two_ranks_export_the_same_weights_once(
    qwen: Path, tmp_path: Path, two_ranks: TwoRanks
) -> None:
    (logits, names), (_, others) = two_ranks(train_and_export, EngineSetup(3), qwen, tmp_path)
    assert names
    assert others == []
    QWEN.save_pretrained(tmp_path)
    with torch.no_grad():
        found = read(tmp_path)(input_ids=TOKENS).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-6)


def test_bf16_exports_are_the_rounded_master_weights(tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        engine = new_engine(EngineSetup(stage, precision="bf16"))
        train_step(engine, 0)
        save(engine, tmp_path / str(stage))
        masters = load_file(tmp_path / str(stage) / "rank-00000-of-00001.safetensors")
        exported = dict(gather_weights(engine.module))
        assert exported.keys() == {name for name, _ in new_net().named_parameters()}
        for name, tensor in exported.items():
            assert torch.equal(tensor, masters[f"weight/{name}"].bfloat16()), name


def test_a_submodule_exports_under_its_own_names(tmp_path: Path) -> None:
    engine = new_engine(EngineSetup(3))
    export_weights(engine.module.wide, tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == ["bias", "weight"]


def test_missing_and_unexpected_names_are_returned_and_a_tied_name_is_enough(
    tmp_path: Path,
) -> None:
    net = new_net()
    tensors = {name: tensor for name, tensor in net.named_parameters() if name != "inner.bias"}
    tensors["head.weight"] = tensors.pop("embedding.weight")
    save_file(tensors | {"stranger": torch.ones(1)}, tmp_path / "model.safetensors")
    other = new_net(seed=1)
    missing, unexpected = load_safetensors(other, [tmp_path / "model.safetensors"])
    assert (missing, unexpected) == (["inner.bias"], ["stranger"])
    assert torch.equal(other.embedding.weight, net.embedding.weight)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\), the model's is \(2, 3\)"):
        load_safetensors(nn.Linear(3, 2), [tmp_path / "model.safetensors"])


def test_large_exports_are_sharded_with_an_index(tmp_path: Path) -> None:
    weights = {
        name: torch.full((size,), float(size)) for name, size in (("a", 3), ("b", 4), ("c", 9))
    }
    ensure_process_group(torch.device("cpu"))
    # 12 + 16 bytes, then 36
    export_weights(nn.ParameterDict(weights), tmp_path, max_shard_bytes=40)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(load_file(tmp_path / "model-00001-of-00002.safetensors")) == ["a", "b"]
    module = nn.ParameterDict({name: torch.zeros_like(t) for name, t in weights.items()})
    assert load_safetensors(module, sorted(tmp_path.glob("*.safetensors"))) == ([], [])
    assert all(torch.equal(module[name], weights[name]) for name in weights)


LARGE = Qwen2Config(
    vocab_size=4000,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=10,
    num_attention_heads=12,
    num_key_value_heads=12,
)


def memory(field: str) -> int:
    """Return VmHWM (the peak) or VmRSS of this process in bytes."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_growth(stage: int, folder: Path) -> int:
    """Return the peak growth of this process in bytes while building and loading a model."""
    before = memory("VmRSS")
    with no_init_weights(), partitioned_init(EngineSetup(stage).config(), CPU):
        model = Qwen2ForCausalLM(LARGE)
    assert load_safetensors(model, sorted(folder.glob("*.safetensors"))) == ([], [])
    return memory("VmHWM") - before


@pytest.mark.slow
def test_partitioned_loading_needs_little_more_memory_than_a_partition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # glibc then returns freed memory, so that the heap's fragmentation is not measured
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    model = Qwen2ForCausalLM(LARGE)
    size = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    del model
    with start_ranks(tmp_path / "store-3") as ranks:
        partitioned = max(ranks(peak_growth, 3, tmp_path))
    with start_ranks(tmp_path / "store-0") as ranks:  # new processes: a peak never falls
        whole = max(ranks(peak_growth, 0, tmp_path))
    print(f"{size / 1e6:.0f} MB: partitioned {partitioned / 1e6:.0f}, whole {whole / 1e6:.0f} MB")
    assert size > 300e6
    assert partitioned < 0.7 * size
    assert whole > size
