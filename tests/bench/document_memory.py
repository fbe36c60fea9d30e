"""Peak memory of tokenizing one txt file that is one document.

    python -m tests.bench.document_memory [--mb 32]

Prints the resident memory that a task adds over the imports, in bytes per byte of the file.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

SENTENCES = (
    "患者，男，54岁，因反复胸闷、气短3年，加重1周入院。体温37.5℃，血压150/95mmHg。",
    "The patient was discharged on day 3 with metformin 500 mg twice daily.",
    "建议低盐低脂饮食，按时服用降压药，定期复查肝肾功能；糖尿病患者应注意足部护理。",
)


def write_document(path: Path, num_bytes: int) -> None:
    """Write a document whose sentences differ by numbers."""
    size = number = 0
    with path.open("w", encoding="utf-8") as file:
        while size < num_bytes:
            line = f"{number}. {SENTENCES[number % len(SENTENCES)]}\n"
            size += len(line.encode())
            number += 1
            file.write(line)


def tokenize(folder: Path, objective: str) -> dict[str, Any]:
    """Tokenize folder/x.txt in this process; return rows, tokens and the peak in bytes."""
    from medgpt.config.data import DataConfig
    from medgpt.config.model import TokenizerConfig
    from medgpt.data.tokenized.encode import DocumentEncoder
    from medgpt.data.tokenized.tokenize import TokenizeJob, list_all_slices, tokenize_slice
    from medgpt.models.tokenizer import train_tokenizer

    kind = "bpe" if objective == "clm" else "wordpiece"
    tokenizer = train_tokenizer(iter(SENTENCES * 9), TokenizerConfig(vocab_size=600), kind)
    encoder = DocumentEncoder(tokenizer, objective)  # pyright: ignore[reportArgumentType]
    source = {"name": "s", "paths": [str(folder / "x.txt")], "license": "MIT"}
    config = DataConfig.model_validate({"sources": [source]})
    job = TokenizeJob(
        data_url=str(folder / "data"),
        rejected_url=str(folder / "rejected"),
        config=config,
        encoding={},
        make_encode=partial(_same, encoder.encode_batch),
    )
    [file_slice] = list_all_slices(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = tokenize_slice(file_slice, 0, job=job)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"account": result["account"], "bytes": (after - before) * 1024}


def _same(value: Any) -> Any:
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(tokenize(Path(args.child[0]), args.child[1])))
        return
    for objective in ("clm", "mlm"):
        for mb in args.mb:
            with tempfile.TemporaryDirectory() as folder:
                write_document(Path(folder) / "x.txt", mb << 20)
                command = [sys.executable, "-m", __spec__.name, "--child", folder, objective]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            gib, per_byte = result["bytes"] / 2**30, result["bytes"] / (mb << 20)
            print(f"{objective}, {mb} MiB: {gib:.2f} GiB, {per_byte:.0f} bytes per byte")


if __name__ == "__main__":
    main()
