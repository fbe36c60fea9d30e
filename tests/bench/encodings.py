"""Measures how often the encoding of a file is recognized, refused, or silently wrong.

    python -m tests.bench.encodings [DATA_FOLDER]

Files are texts of many languages (tests/data/sources/languages.py, and JSON lines of DATA_FOLDER),
as plain lines, CSV and JSON lines, of one row up to thousands. "Silently wrong" means that the text
read differs from the text written. charset-normalizer and the rule of medgpt 0.1 stand beside it.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from charset_normalizer import from_bytes

from medgpt.data.sources.encodings import UncertainEncoding, decide_encoding
from tests.data.sources.languages import ENCODINGS, TEXTS

ROWS = (1, 2, 5, 30, 300)  # rows per file
TRIES = 6  # files of each kind
ASCII_ROWS = 3  # rows of plain English per row in a "mostly ASCII" file
PLAIN = ("The patient was discharged.", "No known allergies.", "Follow-up in two weeks.")


def medgpt(data: bytes) -> str | None:
    try:
        return data.decode(decide_encoding([data])).removeprefix("\ufeff")
    except UncertainEncoding:
        return None


def charset_normalizer(data: bytes) -> str | None:
    best = from_bytes(data[: 1 << 16]).best()
    return None if best is None else data.decode(best.encoding, "replace").removeprefix("\ufeff")


def medgpt_0_1(data: bytes) -> str | None:
    """UTF-8, else GB18030."""
    for encoding in ("utf-8", "gb18030"):
        try:
            return data.decode(encoding).removeprefix("\ufeff")
        except UnicodeDecodeError:
            pass
    return None


def as_lines(rows: Sequence[str]) -> str:
    return "\n".join(rows) + "\n"


def as_csv(rows: Sequence[str]) -> str:
    return "id,text\r\n" + "".join(f'{n},"{row}"\r\n' for n, row in enumerate(rows))


def as_json_lines(rows: Sequence[str]) -> str:
    return "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)


def mostly_ascii(rows: Sequence[str]) -> str:
    return as_csv([text for row in rows for text in (*PLAIN[:ASCII_ROWS], row)])


def corpora(folder: Path | None) -> dict[str, Sequence[str]]:
    """Return rows by language, with rows of the real data folder if there is one."""
    rows: dict[str, Sequence[str]] = dict(TEXTS)
    if folder is not None:
        for language, name in (
            ("Simplified Chinese", "sft_single/huatuo26m_sample.jsonl"),
            ("Traditional Chinese", "pretrain/tcm_shanghan_zht.jsonl"),
        ):
            lines = (folder / name).read_text("utf-8").splitlines()[:3000]
            values = (list(json.loads(line).values()) for line in lines)
            texts = [max((v for v in row if isinstance(v, str)), key=len) for row in values]
            rows[f"{language}, real"] = [" ".join(text.split()) for text in texts if text.strip()]
    return rows


def files(folder: Path | None) -> Iterator[tuple[str, str, int, str, bytes]]:
    """Yield language, encoding, number of rows, text and bytes."""
    rng = random.Random(0)
    for language, texts in corpora(folder).items():
        for encoding in ENCODINGS[language.removesuffix(", real")]:
            for num_rows in ROWS:
                for layout in (as_lines, as_csv, as_json_lines, mostly_ascii):
                    for _ in range(TRIES if num_rows < ROWS[-1] else 1):
                        text = layout(rng.choices(texts, k=num_rows))
                        data = text.encode(encoding, "ignore")
                        text = data.decode(encoding).removeprefix("\ufeff")
                        if not text.isascii():
                            yield language, encoding, num_rows, text, data


def measure(folder: Path | None) -> dict[str, Counter[tuple[str, str, int, str]]]:
    """Return, per reader, the number of files by (language, encoding, rows, verdict)."""
    readers: dict[str, Callable[[bytes], str | None]] = {
        "medgpt": medgpt,
        "utf-8, else gb18030": medgpt_0_1,
        "charset-normalizer": charset_normalizer,
    }
    counts = {name: Counter() for name in readers}
    rng = random.Random(1)
    for language, encoding, num_rows, text, data in files(folder):
        for name, read in readers.items():
            if name == "charset-normalizer" and (num_rows >= ROWS[-2] or rng.random() > 0.1):
                continue  # slow
            got = read(data)
            verdict = "refused" if got is None else "right" if got == text else "wrong"
            counts[name][language, encoding, num_rows, verdict] += 1
    return counts


def main() -> None:
    counts = measure(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    for name, cells in counts.items():
        total = Counter()
        for (*_, verdict), count in cells.items():
            total[verdict] += count
        num = sum(total.values())
        print(
            f"{name}: {num} files, "
            + ", ".join(
                f"{verdict} {100 * total[verdict] / num:.1f} % ({total[verdict]})"
                for verdict in ("right", "refused", "wrong")
            )
        )
    cells = counts["medgpt"]
    print(
        f"\nmedgpt, right/refused/wrong in files of N rows\n{'':40}"
        + "".join(f"{n:>12}" for n in ROWS)
    )
    for language, encoding in dict.fromkeys((key[0], key[1]) for key in cells):
        numbers = [
            "/".join(str(cells[language, encoding, n, v]) for v in ("right", "refused", "wrong"))
            for n in ROWS
        ]
        print(f"{language + ' in ' + encoding:40}" + "".join(f"{n:>12}" for n in numbers))


if __name__ == "__main__":
    main()
