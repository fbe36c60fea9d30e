"""Nothing that comes from elsewhere is run: no pickle, and no model's code unless asked for."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.models import model_files

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "medgpt").rglob("*.py"))
UNPICKLERS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
EVIL = """
from pathlib import Path
from transformers import PretrainedConfig
Path(__file__).touch()
Path({marker!r}).touch()
class EvilConfig(PretrainedConfig):
    model_type = "evil"
"""
UNPICKLE = """
import sys
from pathlib import Path
import torch
from medgpt.engine.transformers_trainer import load_weights_only

class Evil:
    def __reduce__(self):
        return Path.touch, (Path(sys.argv[1] + "/ran"),)

shard = sys.argv[1] + "/shard.pt"
torch.save({"weight": torch.ones(1), "more": Evil()}, shard)
load_weights_only()
try:
    torch.load(shard, weights_only=False)  # as DeepSpeed says it
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_reads_pickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert not UNPICKLERS & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNPICKLERS
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "eval", "exec"), f"{path}: {called}"
            assert all(keyword.arg != "allow_pickle" for keyword in node.keywords)


def test_a_checkpoint_of_deepspeed_that_holds_code_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNPICKLE, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1:] == ["UnpicklingError"], found.stderr
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_runs_only_if_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    model, marker = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    (model / "evil.py").write_text(EVIL.format(marker=str(marker)))
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="trust_remote_code"):
        model_files.load_hf_config(ModelConfig(name=str(model)), "clm")
    assert not marker.exists()
    with pytest.raises(ConfigError):  # it has no weights
        model_files.load_hf_config(ModelConfig(name=str(model), trust_remote_code=True), "clm")
    assert marker.exists()
