"""Texts, spreadsheets and files of other programs: what each is read as, or named as."""

import datetime
import gzip
import io
import json
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from glm_finetune.data import lines
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.files import list_data_files
from tests.refusal import refused
from tests.test_formats import ROWS, jsonl, rows_in, settings, write
from tests.test_public_formats import asked, detected
from tests.tiny import read_rows

__all__ = ["settings"]  # a fixture

# Texts


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("compressed", [False, True])
def test_blank_lines_separate_the_documents_of_a_text(newline, compressed, tmp_path, settings):
    text = "\ufeff\n第一段\n  第二行 \n\n \t\n另一篇\n\n\nlast".replace("\n", newline).encode()
    path = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    write(path, gzip.compress(text) if compressed else text)
    found = list(read_rows(path))
    assert [row for _, row in found] == [{"text": "第一段\n  第二行 "}, {"text": "另一篇"}, {"text": "last"}]
    assert [where.rpartition(", ")[2] for where, _ in found] == ["line 2", "line 6", "line 9"]
    assert detected(path).data_format == "text"
    plain = write(tmp_path / "a.jsonl", jsonl(row for _, row in found))
    assert list(InstructionDataset(path, settings())) == list(InstructionDataset(plain, settings()))
    assert asked(path)[1] == ([{"role": "user", "content": "另一篇"}], None)


def test_a_text_that_holds_json_is_read_as_json(tmp_path):
    assert rows_in(write(tmp_path / "a.txt", jsonl())) == ROWS
    assert rows_in(write(tmp_path / "b.txt", json.dumps(ROWS, indent=1).encode())) == ROWS
    text = "[1] 参考文献\n{花括号}"
    assert rows_in(write(tmp_path / "c.txt", text.encode())) == [{"text": text}]


def test_bad_texts_are_named_with_their_first_line(tmp_path, settings, monkeypatch):
    gbk = write(tmp_path / "a.txt", "好\n\n坏\n".encode("gbk"))
    refused(lambda: InstructionDataset(gbk, settings()), "a.txt, line 1: not UTF-8 (byte 0)", "iconv -f GBK")
    half = write(tmp_path / "b.txt", "好\n\n".encode() + "坏".encode("gbk"))
    assert len(InstructionDataset(half, settings(on_bad_row="skip"))) == 1
    monkeypatch.setattr(lines, "MAX_LINE", 50)
    long = write(tmp_path / "c.txt", b"a\n\n" + b"x" * 30 + b"\n" + b"x" * 30 + b"\n\nb\n\n" + b"y" * 70)
    data = InstructionDataset(long, settings(on_bad_row="skip"))
    assert len(data) == 2 and [problem.split(": ")[0].rpartition(" ")[2] for problem in data.report.bad] == ["3", "8"]
    refused(lambda: rows_in(long), "c.txt, line 3: longer than", "a blank line ends a text")
    refused(lambda: rows_in(write(tmp_path / "d.txt", b" \n\n")), "d.txt: the file is empty")


def test_texts_are_streamed(tmp_path):
    content = (b"x" * 2000 + b"\n\n") * 5000
    path = write(tmp_path / "a.txt", content)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) / 10


# Spreadsheets


def spreadsheet(path, rows, change=None):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    if change:
        change(book.active)
    book.create_sheet("notes")
    book.save(path)
    return path


@pytest.mark.parametrize("empty", [0, 1])
def test_the_sheet_that_holds_something_is_read_and_several_are_refused(empty, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheets = [book.active, book.create_sheet("second")]
    for cells in CELLS[:2]:
        sheets[1 - empty].append(cells)
    book.save(tmp_path / "a.xlsx")
    assert rows_in(tmp_path / "a.xlsx") == [{"question": CELLS[1][0], "answer": CELLS[1][1] or ""}]
    sheets[empty].append(["a note"])
    book.save(tmp_path / "a.xlsx")
    refused(lambda: rows_in(tmp_path / "a.xlsx"), "2 sheets hold something", "'Sheet', 'second'")


@pytest.mark.parametrize(
    "name, header", [("a.csv", "question;answer"), ("a.csv", "question\tanswer"), ("a.tsv", "q,a")]
)
def test_a_table_with_another_delimiter_is_named(name, header, tmp_path):
    path = write(tmp_path / name, f"{header}\nx;y\n".encode())
    refused(lambda: rows_in(path), "one column", "separated by", "Save it")


CELLS = [["question", "answer"], *([row["question"], row["answer"] or None] for row in ROWS)]


@pytest.mark.parametrize("compressed", [False, True])
def test_the_first_sheet_is_rows_of_texts(compressed, tmp_path):
    path = spreadsheet(tmp_path / "a.xlsx", [[], *CELLS[:2], [None, ""], CELLS[2], [], [None]])
    if compressed:
        path = write(tmp_path / "b.xlsx.gz", gzip.compress(path.read_bytes()))
    found = list(read_rows(path))
    assert [row for _, row in found] == ROWS
    assert [where.rpartition(", ")[2] for where, _ in found] == ["row 3", "row 5"]
    assert detected(path).data_format == "question_answer"


def test_cells_are_the_texts_that_they_show(tmp_path):
    cells = ["=", 3, 3.0, 0.1, True, datetime.datetime(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4), " x\ny "]

    def as_text(sheet):
        sheet["A2"].data_type = "s"  # a text that begins like a formula

    path = spreadsheet(tmp_path / "a.xlsx", [[f"c{i}" for i in range(len(cells))], cells], as_text)
    expected = ["=", "3", "3", "0.1", "TRUE", "2026-01-02", "2026-01-02 03:04:00", " x\ny "]
    assert [*rows_in(path)[0].values()] == expected


@pytest.mark.parametrize(
    "rows, change, parts",
    [
        ([*CELLS, ["q", "=A1&B1"]], None, ["cell B4: a formula, '=A1&B1'", "values"]),
        (CELLS, lambda sheet: sheet.merge_cells("A2:A3"), ["cells A2:A3: merged", "Unmerge"]),
        ([["q", "q"], ["a", "b"]], None, ["two columns are named 'q'"]),
        ([["q", None, "a"], ["a", "b", "c"]], None, ["row 1: column 2 has no name"]),
        ([*CELLS, ["q", "a", "more"]], None, ["row 4: 1 more values than the header has"]),
        ([CELLS[0]], None, ["the file is empty"]),
    ],
)
def test_what_a_sheet_must_not_have_is_named_with_its_cell(rows, change, parts, tmp_path):
    path = spreadsheet(tmp_path / "a.xlsx", rows, change)
    refused(lambda: rows_in(path), "a.xlsx", *parts)


def test_a_sheet_is_read_whatever_dimensions_it_says(tmp_path):
    path = spreadsheet(tmp_path / "a.xlsx", CELLS)
    changed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'<dimension ref="A1:B3"', b'<dimension ref="A1"'))
    assert rows_in(write(path, changed.getvalue())) == ROWS


def test_no_spreadsheet_and_no_library_are_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.xlsx", b"question,answer\n")
    refused(lambda: rows_in(path), "a.xlsx: not a readable .xlsx file")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    refused(lambda: rows_in(path), "a.xlsx", "pip install openpyxl")


# Files of other programs


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", ["an old Excel file", ".xlsx or .csv"]),
        ("a.docx", b"PK\x03\x04", ["a Word file", ".txt"]),
        ("a.pdf", b"%PDF-1.7", ["a PDF", ".txt"]),
        ("a.zip", b"PK\x03\x04", ["an archive", "Unpack it"]),
        ("a.csv", b"PK\x03\x04", ["a zip archive, or an Office file", "Unpack it"]),
        ("a.jsonl", b"%PDF-1.7", ["a PDF"]),
        ("a.json", gzip.compress(b"{}", mtime=0), ["a gzip file", ".gz"]),
        ("a.data", b"PAR1", ["a Parquet file", ".parquet"]),
        ("a.txt.gz", gzip.compress(b"Rar!"), ["an archive"]),
        ("dataset_info.json", b'{"a": {"file_name": "a.json"}}', ["describes the data beside it"]),
    ],
)
def test_a_file_of_another_program_is_named_for_what_it_is(name, content, parts, tmp_path):
    message = refused(lambda: list_data_files(write(tmp_path / name, content)), name, *parts)
    assert "iconv" not in message


def test_a_folder_takes_every_kind_and_passes_over_what_is_no_data(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.txt", b"t")
    spreadsheet(tmp_path / "c.xlsx", CELLS)
    for name in (
        "README.txt",
        "LICENSE.txt",
        "requirements.txt",
        "dataset_infos.json",
        "~$c.xlsx",
        ".d.txt",
        "notes.md",
    ):
        write(tmp_path / name, b"x")
    for name in ("bad_rows.txt", "predictions.jsonl.settings.json"):
        write(tmp_path / name, b"{}")
    assert [Path(one.path).name for one in list_data_files(tmp_path)] == ["a.jsonl", "b.txt", "c.xlsx"]
    assert rows_in(tmp_path) == [*ROWS, {"text": "t"}, *ROWS]
