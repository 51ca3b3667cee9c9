"""Files of every kind hold the rows that Python and pandas find in them, or the error names the line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from petals_lightning.data.columns import find_text_column
from petals_lightning.data.files import read_file
from petals_lightning.data.opening import TextFormat
from petals_lightning.data.sources import load_splits
from petals_lightning.errors import ConfigurationError, DataError

WORDS = ["1.0", "007", "2020-01-01", "NA", "null", "None", "nan", "True", "", " ", "1e5", "-1", "12:30", "N/A", "#N/A"]
"""What readers that guess take for something else than text."""
TRICKY = [
    *WORDS,
    'a "quoted" word',
    '"all quoted"',
    "two\nlines",
    "comma, semicolon; tab\t pipe|",
    "漢字 😀 é",
    "'",
    '"',
]
FRAME = pd.DataFrame({"text": TRICKY, "label": [str(row % 2) for row in range(len(TRICKY))]})
ROWS = FRAME.to_dict("records")
TYPED = [{"text": text, "label": row % 2} for row, text in enumerate(TRICKY)]


def rows_of(path: Path, **options: str) -> list[dict]:
    return read_file(path, TextFormat(**options)).to_list()


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_csv_cells_are_the_strings_that_were_written(
    tmp_path: Path, delimiter: str, line_end: str, encoding: str
) -> None:
    text = FRAME.to_csv(index=False, sep=delimiter, lineterminator=line_end, quoting=csv.QUOTE_NONNUMERIC)
    assert rows_of(write(tmp_path / "a.csv", text, encoding)) == ROWS


def test_csv_reads_as_pandas_reads_strings(tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(100):
        cells = [["".join(draw.choices('ab "\n,;0é', k=draw.randint(1, 6))) for _ in range(2)] for _ in range(5)]
        path = tmp_path / f"{number}.csv"
        pd.DataFrame(cells, columns=["x", "y"]).to_csv(path, index=False)
        assert rows_of(path) == pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def test_blank_lines_index_columns_and_blanks_around_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\n,text, label\n\n0,x,1\n\n1,y z, 0\n")
    assert rows_of(path) == [
        {"Unnamed: 0": "0", "text": "x", "label": "1"},
        {"Unnamed: 0": "1", "text": "y z", "label": " 0"},
    ]


def test_quotes_in_tsv_are_text_unless_they_are_well_formed(tmp_path: Path) -> None:
    raw = write(tmp_path / "glue.tsv", 'sentence\tlabel\n"he said\t1\n" yes "\t0\nno"\t1\n')
    assert [row["sentence"] for row in rows_of(raw)] == ['"he said', '" yes "', 'no"']
    by_chance = write(tmp_path / "chance.tsv", 'sentence\tlabel\n"one half\t1\nthe other"\t0\n')
    assert [row["sentence"] for row in rows_of(by_chance)] == ['"one half', 'the other"']
    FRAME.to_csv(tmp_path / "pandas.tsv", sep="\t", index=False)
    assert rows_of(tmp_path / "pandas.tsv") == ROWS
    FRAME[~FRAME.text.str.contains("[\n\t]")].to_csv(tmp_path / "lines.tsv", sep="\t", index=False)
    assert [row["text"] for row in rows_of(tmp_path / "lines.tsv")] == [t for t in TRICKY if not set(t) & set("\n\t")]


def test_cells_may_be_large(tmp_path: Path) -> None:
    long = "word " * 500_000
    for name, cell in {"plain.csv": long, "quoted.csv": f'"{long}"', "a.tsv": long}.items():
        delimiter = "\t" if name == "a.tsv" else ","
        assert rows_of(write(tmp_path / name, f"text{delimiter}label\n{cell}{delimiter}1\n"))[0]["text"] == long


def test_a_delimiter_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text^label\na, b^1\n")
    assert rows_of(path, delimiter="^") == [{"text": "a, b", "label": "1"}]
    assert rows_of(write(tmp_path / "b.csv", "a,b;c\n1,2;3\n"), delimiter="semicolon") == [{"a,b": "1,2", "c": "3"}]
    with pytest.raises(ConfigurationError, match=r"^delimiter=::: must be one character"):
        TextFormat(delimiter="::")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\na,1\n\nbad, but fun,1\n", r"line 4 has 3 cells, the header 2: \['bad', ' but fun', '1'\]"),
        ("text,label\na,1\nb\n", r"line 3 has 1 cells, the header 2"),
        ('text,label\n"a\nb",1\n"c,0\nd,1\n', r"line 4 opens a quote that is not closed"),
        (
            'label,text\n1,a\n0,"stray\n1,b\n0,"again\n1,c\n',
            r"line 3 opens a quote that is not closed, or not at",
        ),
        ("text,label,label\na,1,1\n", r"two columns are called 'label'"),
        ("text,label\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_broken_csv_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.csv: .*{message}") as raised:
        read_file(write(tmp_path / "a.csv", text))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "txt"])
def test_another_encoding_is_named_and_can_be_set(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text, "label": "1"} for text in ("plain", "naïve café", "x")]
    lines = {
        "csv": "text,label\nplain,1\nnaïve café,1\nx,1\n",
        "tsv": "text\tlabel\nplain\t1\nnaïve café\t1\nx\t1\n",
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, ensure_ascii=False).replace("{", "\n{"),
        "txt": "plain\nnaïve café\n",
    }[suffix]
    path = write(tmp_path / f"a.{suffix}", lines, "latin-1")
    line = next(number for number, line in enumerate(lines.splitlines(), 1) if "ï" in line)
    with pytest.raises(DataError, match=rf"cannot be read as {suffix}: byte 0xef in line {line} is not UTF-8; set enc"):
        read_file(path)
    assert rows_of(path, encoding="latin-1") == ([{"text": lines}] if suffix == "txt" else rows)
    with pytest.raises(ConfigurationError, match=r"^encoding=latin-99: no such encoding"):
        TextFormat(encoding="latin-99")


def test_a_byte_order_mark_counts_more_than_the_encoding_that_was_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\né,1\n", "utf-16")
    assert rows_of(path, encoding="latin-1") == [{"text": "é", "label": "1"}]
    unmarked = write(tmp_path / "b.csv", "text,label\né,1\n", "utf-16-le")
    assert rows_of(unmarked, encoding="utf-16-le") == [{"text": "é", "label": "1"}]


JSON_FORMS: dict[str, Callable[[pd.DataFrame], str]] = {
    "lines": lambda frame: frame.to_json(orient="records", lines=True),
    "array": lambda frame: frame.to_json(orient="records"),
    "indented array": lambda frame: json.dumps(frame.to_dict("records"), indent=2, ensure_ascii=False),
    "array over lines": lambda frame: "[" + ",\n".join(map(json.dumps, frame.to_dict("records"))) + "]\n",
    "indented objects": lambda frame: "\n".join(json.dumps(row, indent=1) for row in frame.to_dict("records")),
    "data": lambda frame: json.dumps({"version": "1.1", "data": frame.to_dict("records")}),
    "any single list": lambda frame: json.dumps({"reviews": frame.to_dict("records"), "license": "MIT"}, indent=1),
    "pandas' default": lambda frame: frame.to_json(),
    "pandas' index": lambda frame: frame.to_json(orient="index"),
    "rows by their ids": lambda frame: json.dumps(
        {f"id {row}": cells for row, cells in frame.to_dict("index").items()}
    ),
    "pandas' split": lambda frame: frame.to_json(orient="split"),
    "columns": lambda frame: json.dumps(frame.to_dict("list")),
}


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_json_of_any_form_gives_its_rows(tmp_path: Path, form: str, encoding: str) -> None:
    path = write(tmp_path / "a.json", JSON_FORMS[form](pd.DataFrame(TYPED)), encoding)
    assert rows_of(path) == TYPED


def test_pandas_table_form_has_the_index_beside_the_rows(tmp_path: Path) -> None:
    pd.DataFrame(TYPED).to_json(tmp_path / "a.json", orient="table")
    assert [{"text": row["text"], "label": row["label"]} for row in rows_of(tmp_path / "a.json")] == TYPED


@pytest.mark.parametrize("row", [{"messages": [{"role": "user", "content": "hi"}]}, {"turns": ["hi", "no"]}])
def test_a_dialogue_by_itself_is_one_row(tmp_path: Path, row: dict) -> None:
    for name, text in {
        "a.json": json.dumps(row, indent=1),
        "a.jsonl": json.dumps(row),
        "b.json": json.dumps([row]),
    }.items():
        assert rows_of(write(tmp_path / name, text)) == [row]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"text": "a"}\n\n{"text": "b\n',
            r"line 3, character 12: Invalid control character",
        ),
        ('[{"text": "a"},\n{"text": }]', r"line 2, character 10: Expecting value"),
        ('[{"text": "a"},\n{"text": "b"}', "its array is not closed"),
        ('[{"text": "a"}] [{"text": "b"}]', "its array is not closed, or something follows it"),
        ('{"train": [{"a": 1}], "test": [{"a": 1}]}', r"it holds several lists \(train, test\)"),
        ('[["a", 1]]', r"row 0 is \['a', 1\], not an object"),
        ('{"text": "a"}\n{"text": "half \\ud83d"}\n', r"row 1 has half of a surrogate pair in column 'text'"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_broken_json_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.json: .*({message})") as raised:
        read_file(write(tmp_path / "a.json", text))
    assert "\n" not in str(raised.value)


def test_json_rows_may_differ_in_their_fields_and_types(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "x", "c": "y"}, {"a": "2", "c": ["y", {"z": 1}]}, {"a": None, "b": float("nan"), "d": 1.5}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert rows_of(path) == [
        {"a": "1", "b": "x", "c": "y", "d": None},
        {"a": "2", "b": None, "c": ["y", {"z": 1}], "d": None},
        {"a": None, "b": None, "c": None, "d": 1.5},
    ]


def test_types_may_change_late(tmp_path: Path) -> None:
    rows = [{"label": row, "content": "x"} for row in range(25_000)] + [{"label": "last", "content": ["y"]}]
    read = read_file(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert read["label"][:] == [str(row["label"]) for row in rows]
    assert read["content"][:] == [row["content"] for row in rows]


def zipped(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.stem, data)


def zstandard(path: Path, data: bytes) -> None:
    with pa.output_stream(path, compression="zstd") as file:
        file.write(data)


PACKERS: dict[str, Callable[[Path, bytes], object]] = {
    "gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    "xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    "zst": zstandard,
    "zip": zipped,
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "ndjson", "parquet", "arrow", "txt"])
def test_compressed_files_are_read_as_they_are(tmp_path: Path, packing: str, suffix: str) -> None:
    plain = tmp_path / f"a.{suffix}"
    match suffix:
        case "csv" | "tsv":
            FRAME.to_csv(plain, index=False, sep="," if suffix == "csv" else "\t")
        case "parquet":
            FRAME.to_parquet(plain)
        case "arrow":
            FRAME.to_feather(plain, compression="uncompressed")
        case "txt":
            plain.write_text("\n".join(TRICKY))
        case _:
            FRAME.to_json(plain, orient="records", lines=suffix != "json")
    packed = tmp_path / f"a.{suffix}.{packing}".upper()
    PACKERS[packing](packed, plain.read_bytes())
    assert rows_of(packed) == rows_of(plain) == ([{"text": "\n".join(TRICKY)}] if suffix == "txt" else ROWS)


def test_packed_utf16_is_read_too(tmp_path: Path) -> None:
    for packing, pack in PACKERS.items():
        path = tmp_path / f"a.csv.{packing}"
        pack(path, FRAME.to_csv(index=False).encode("utf-16"))
        assert rows_of(path) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv.gz", b"text,label\n", r"a\.csv\.gz: cannot be read as csv: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"text,label\na,1\n" * 99, mtime=0)[:-20], r"a\.csv\.gz: cannot be read as csv"),
        ("a.json.xz", b"{}", r"a\.json\.xz: cannot be read as json"),
        ("a.csv.zip", b"{}", r"a\.csv\.zip: cannot be read as csv: File is not a zip file"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read as parquet"),
        (
            "a.csv",
            gzip.compress(b"text,label\na,1\n", mtime=0),
            r"a\.csv: cannot be read as csv: it contains zero bytes",
        ),
        ("a.jsonl", b"PAR1\x15\x00\x15\xff", r"a\.jsonl: cannot be read as jsonl: it contains zero bytes"),
        ("a.arrow", b"ARROW", r"a\.arrow: cannot be read as arrow"),
        ("a.md", b"# x", r"a\.md: unknown format; use one of \.jsonl, .* \.txt, .*packed as \.gz, .* \.zip"),
        ("a.gz", b"", r"a\.gz: unknown format"),
        (
            "train-00000-of-00001.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "cannot be read as parquet: only git-lfs's pointer to the data is here; fetch the data with `git lfs pull`",
        ),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as raised:
        read_file(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_an_error_lists_no_more_columns_than_one_reads(tmp_path: Path) -> None:
    names = [f"column {number}" for number in range(60)]
    rows = read_file(write(tmp_path / "a.csv", ",".join(names) + "\n" + ",".join("1" * 60) + "\n"))
    with pytest.raises(DataError, match=r"'column 19', … \(60 in all\)"):
        find_text_column(rows)


def test_shards_of_differing_types_make_one_column(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    write(tmp_path / "train-00001-of-00003.csv", "text,label\nc,1\n")
    pa.parquet.write_table(
        pa.table({"label": [0.0], "text": ["d"], "more": [True]}), tmp_path / "train-00002-of-00003.parquet"
    )
    splits = load_splits(str(tmp_path))
    assert splits["train"].to_list() == [
        {"text": "a", "label": "1", "more": None},
        {"text": "b", "label": "0", "more": None},
        {"text": "c", "label": "1", "more": None},
        {"text": "d", "label": "0.0", "more": True},
    ]
    assert splits.where("train", 1) == f"row 1 of {tmp_path}/train-00000-of-00003.jsonl"
    assert splits.where("train", 3) == f"row 0 of {tmp_path}/train-00002-of-00003.parquet"


def test_class_names_survive_in_shards(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for part in range(2):
        datasets.Dataset.from_dict({"text": ["a"], "label": [part]}, features=features).to_parquet(
            tmp_path / f"train-0000{part}-of-00002.parquet"
        )
    train = load_splits(str(tmp_path))["train"]
    assert train.features == features
    assert train["label"][:] == [0, 1]


def test_text_columns_of_any_arrow_type(tmp_path: Path) -> None:
    types = {"plain": pa.string(), "large": pa.large_string(), "view": pa.string_view()}
    columns = {name: pa.array(["x", "y"], type_) for name, type_ in types.items()}
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [dict.fromkeys(types, "x"), dict.fromkeys(types, "y")]
