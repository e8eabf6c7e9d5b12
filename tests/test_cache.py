"""Prepared data: the rows of a file, made once, never half read, right whenever it is there."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from glm_finetune import MODE
from glm_finetune.data import blocks, cache, prepare
from glm_finetune.data.columns import COLUMNS
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.files import list_data_files
from glm_finetune.data.formats import FORMATS
from glm_finetune.data.samples import Settings
from glm_finetune.modes.spec import Limits
from tests.ranks import run_ranks
from tests.refusal import contents, refused
from tests.test_training import run

LIMITS = Limits(128, 64)


@pytest.fixture
def settings(checkpoints):
    return settings_of("glm3", checkpoints)


def settings_of(mode, checkpoints, **options):
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    return Settings(MODE[mode].template, tokenizer, **{"limits": LIMITS, **options})


def dataset(settings, path, cache_dir, **options):
    return InstructionDataset(path, settings, cache_dir=cache_dir, **options)


def prepared(path, settings, cache_dir, num_workers=None):
    return cache.prepared(list_data_files(path), settings, cache_dir, num_workers=num_workers)


def key_of(path, settings):
    sources = list_data_files(path)
    return cache.key_of(sources, [blocks.content_of(source) for source in sources], settings)


def no_work(monkeypatch):
    """From here on reading a data file, or a row of it, is an error."""
    for module, name in ((prepare, "tokenize_block"), (blocks, "scan")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("the file was read again"))


@pytest.mark.parametrize("mode", MODE)
def test_prepared_rows_are_what_the_mode_renders(mode, checkpoints, data_file, rows, tmp_path):
    settings, form = settings_of(mode, checkpoints), FORMATS["instruction"]
    expected = [MODE[mode].render(settings.tokenizer, form.messages(row), LIMITS) for row in rows]
    data = dataset(settings, data_file, tmp_path / "cache")
    names = ("input_ids", "labels", "num_prefix")
    assert list(data) == [{name: getattr(sample, name) for name in names} for sample in expected]
    assert data.report.tokens == sum(data.lengths()) == sum(len(sample.input_ids) for sample in expected)
    assert data.report.targets == sum(label != -100 for sample in expected for label in sample.labels)
    assert data.report.rows == data.report.kept == 11 and data.report.answer_empty == 1
    assert data.report.longest == max(data.lengths())
    assert list(dataset(settings, data_file, None)) == list(data) and data[-1] == data[10]


def test_a_row_is_found_again_in_its_file(settings, data_file, tmp_path):
    lines = data_file.read_text(encoding="utf-8").splitlines()
    data_file.write_text("\n\n".join(lines), encoding="utf-8")
    data = dataset(settings, data_file, tmp_path / "cache")
    assert data.where(0) == f"{data_file}, line 1" and data.where(4) == f"{data_file}, line 9"
    data_file.write_text("[" + ",".join(lines) + "]", encoding="utf-8")
    assert dataset(settings, data_file, tmp_path / "cache").where(4) == f"{data_file}, entry 5"


def test_a_second_start_reads_nothing_but_the_cache(settings, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MIN_AGE_SECS", -1)
    first = list(dataset(settings, data_file, tmp_path / "cache"))
    no_work(monkeypatch)
    assert list(dataset(settings, data_file, tmp_path / "cache")) == first


def layout_of(path, cache_dir):
    (source,) = list_data_files(path)
    return blocks.layout_of(source, path, cache_dir)


def test_a_young_file_is_read_again_unless_it_is_large(data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MIN_AGE_SECS", 0.2)
    for name, large, notes in (("small", 2**28, 0), ("large", 100, 1)):
        monkeypatch.setattr(blocks, "LARGE_BYTES", large)
        data_file.touch()
        layout_of(data_file, tmp_path / name)
        assert len(list((tmp_path / name).glob("files/*.json"))) == notes
    time.sleep(0.3)
    layout_of(data_file, tmp_path / "small")
    assert len(list((tmp_path / "small").glob("files/*.json"))) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"signature": 3, "blocks": []}'])
def test_a_damaged_note_of_a_file_is_written_again(text, settings, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MIN_AGE_SECS", -1)
    first = layout_of(data_file, tmp_path)
    [note] = tmp_path.glob("files/*.json")
    note.write_text(text)
    assert layout_of(data_file, tmp_path) == first
    no_work(monkeypatch)
    assert layout_of(data_file, tmp_path) == first


def test_equal_content_elsewhere_is_found_and_named_where_it_is(settings, data_file, tmp_path, monkeypatch):
    first = dataset(settings, data_file, tmp_path / "cache")
    other = shutil.copy(data_file, tmp_path / "other.jsonl")
    monkeypatch.setattr(prepare, "tokenize_block", lambda *args: pytest.fail("tokenized again"))
    again = dataset(settings, other, tmp_path / "cache")
    assert list(again) == list(first) and again.where(2) == f"{other}, line 3"


def test_other_content_with_the_size_and_time_of_the_old_is_noticed(settings, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MIN_AGE_SECS", -1)
    first, status = dataset(settings, data_file, tmp_path / "cache"), data_file.stat()
    text = data_file.read_text(encoding="utf-8")
    data_file.write_text(text.replace("抽取", "取抽"), encoding="utf-8")
    os.utime(data_file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert data_file.stat().st_size == status.st_size
    assert list(dataset(settings, data_file, tmp_path / "cache")) != list(first)


def no_drafts(template, tokenizer, messages, style, train_on):
    """Settings.drafts of an objective that trains nothing."""
    return []


def test_the_name_of_the_cache_follows_from_all_that_decides_the_rows(settings, checkpoints, data_file, tmp_path):
    folder = shutil.copytree(checkpoints["glm3"], tmp_path / "base")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    changes = {
        "template": [MODE["glm2"].template],
        "tokenizer": [MODE["glm3"].tokenizer.from_pretrained(folder), settings_of("glm2", checkpoints).tokenizer],
        "limits": [Limits(127, 64), Limits(128, 63), Limits(128, 64, "head"), Limits(128, 64, end_cut_answers=False)],
        "style": ["official"],
        "train_on": ["last"],
        "too_long": ["drop", "error"],
        "data_format": ["instruction"],
        "columns": [{"input": "text"}],
        "roles": [{"client": "user"}],
        "tags": [("speaker", "said")],
        "is_told": [True],
        "prompt_text": ["x"],
        "separator": [":"],
        "repair": [True],
        "on_bad_row": ["skip"],
        "drafts": [no_drafts],
    }
    assert changes.keys() == {item.name for item in fields(Settings)}
    others = [replace(settings, **{name: value}) for name, values in changes.items() for value in values]
    keys = [key_of(data_file, other) for other in (settings, *others)]
    assert key_of(data_file, settings) == keys[0] == key_of(data_file, settings_of("glm3", checkpoints))
    keys += [key_of(f"{data_file}:2", settings), key_of(f"{data_file},{data_file}", settings)]
    for name in ("a.csv", "a.tsv"):
        shutil.copy(data_file, tmp_path / name)
        keys.append(key_of(tmp_path / name, settings))
    damage_last_line(data_file)
    keys.append(key_of(data_file, settings))
    assert len(set(keys)) == len(keys)


def test_a_change_of_the_code_is_another_cache(settings, data_file, tmp_path, monkeypatch):
    before = key_of(data_file, settings)
    package = shutil.copytree(cache.PACKAGE, tmp_path / "glm_finetune", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "PACKAGE", package)
    assert key_of(data_file, settings) == before
    for name in ("modes/glm3.py", "objectives/instruct.py"):
        with open(package / name, "a") as file:
            file.write("# changed\n")
        before, old = key_of(data_file, settings), before
        assert before != old


def flip(path):
    """Change one bit; an empty file gets a byte."""
    data = bytearray(path.read_bytes() or b"\0")
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "name, harm",
    [
        ("input_ids", cut),
        ("is_target", cut),
        ("ends", Path.unlink),
        *((name, flip) for name in COLUMNS),
        ("header.json", Path.unlink),
        ("header.json", cut),
        ("header.json", lambda path: path.write_text("[]")),
        ("header.json", lambda path: path.write_text(path.read_text().replace('"format": 3', '"format": 2'))),
        ("header.json", lambda path: path.write_text(path.read_text().replace('"skipped"', '"omitted"'))),
    ],
)
def test_a_damaged_cache_is_named_and_prepared_again(name, harm, settings, data_file, tmp_path, capsys):
    first = list(dataset(settings, data_file, tmp_path / "cache"))
    [folder] = [path for path in (tmp_path / "cache").iterdir() if (path / "header.json").is_file()]
    harm(folder / name)
    assert list(dataset(settings, data_file, tmp_path / "cache")) == first
    assert f"{folder}: damaged (" in capsys.readouterr().out
    assert list(dataset(settings, data_file, tmp_path / "cache")) == first
    assert capsys.readouterr().out == ""


def test_of_large_arrays_evenly_spread_pieces_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHECKED_BYTES", 4 * 2**20)
    path, data = tmp_path / "array", bytearray(12 * 2**20)  # four pieces of a MiB: they begin at 0, 3.7, 7.3 and 11
    path.write_bytes(data)
    whole = cache.checksum(path)
    for mib, is_seen in ((0, True), (2, False), (4, True), (6, False), (8, True), (12 - 1 / 2**20, True)):
        data[int(mib * 2**20)] = 1
        path.write_bytes(data)
        assert (cache.checksum(path) != whole) == is_seen
        data[int(mib * 2**20)] = 0


def test_rows_that_are_all_dropped_are_said_at_every_start(settings, data_file, tmp_path):
    settings = replace(settings, limits=Limits(14, 8), too_long="drop")
    for _ in range(2):
        refused(lambda: dataset(settings, data_file, tmp_path / "cache"), "no row left", "skipped 11")


def test_a_cache_can_be_deleted_while_it_is_in_use(settings, data_file, tmp_path):
    data = dataset(settings, data_file, tmp_path / "cache")
    expected = list(data)
    shutil.rmtree(tmp_path / "cache")
    assert list(data) == expected
    assert list(dataset(settings, data_file, tmp_path / "cache")) == expected


def test_overwrite_prepares_again(settings, data_file, tmp_path, monkeypatch):
    first = list(dataset(settings, data_file, tmp_path / "cache"))
    seen, work = [], prepare.tokenize_block
    monkeypatch.setattr(prepare, "tokenize_block", lambda *args: seen.append(args) or work(*args))
    assert list(dataset(settings, data_file, tmp_path / "cache")) == first and not seen
    assert list(dataset(settings, data_file, tmp_path / "cache", overwrite_cache=True)) == first and len(seen) == 1


def damage_last_line(path):
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"instruction": "a", "input": 3, "output": "b"}\n')


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_line_stops_with_its_number_and_leaves_nothing(
    num_workers, settings, data_file, tmp_path, monkeypatch, fork_server
):
    damage_last_line(data_file)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    refused(
        lambda: prepared(data_file, settings, tmp_path / "cache", num_workers),
        f"{data_file}, line 12: field 'input' is 3, not a string",
    )
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != "files"]


def test_a_file_that_changes_while_it_is_read_is_refused(settings, data_file, tmp_path, monkeypatch):
    work = prepare.tokenize_block
    monkeypatch.setattr(prepare, "tokenize_block", lambda *args: damage_last_line(data_file) or work(*args))
    refused(lambda: prepared(data_file, settings, tmp_path / "cache"), "was changed while it was read")


def test_no_room_for_the_cache_is_said_with_the_flag(settings, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=r"--cache_dir .*no space left.*--streaming"):
        prepared(data_file, settings, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("tmp-*"))
    (tmp_path / "a-file").touch()
    with pytest.raises(OSError, match="--cache_dir .*a-file"):
        prepared(data_file, settings, tmp_path / "a-file")


KILLED = """
import sys
from tests.test_cache import MODE, LIMITS, Settings, blocks, cache, prepared, SLOW_TEMPLATE
blocks.BLOCK_BYTES = 300
base, data, folder, num_workers = sys.argv[1:]
settings = Settings(SLOW_TEMPLATE, MODE["glm3"].tokenizer.from_pretrained(base), LIMITS)
cache.key_of = lambda *args: "key"
prepared(data, settings, folder, int(num_workers))
"""


def slow_draft(tokenizer, messages, *args):
    """Drafts, until a row comes that takes for ever."""
    if "never" in messages[0]["content"]:
        print("half", flush=True)
        time.sleep(600)
    return MODE["glm3"].template.draft(tokenizer, messages, *args)


SLOW_TEMPLATE = replace(MODE["glm3"].template, draft=slow_draft)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_in_the_middle_it_leaves_nothing_that_counts(
    num_workers, settings, checkpoints, data_file, tmp_path, monkeypatch
):
    with open(data_file, "a", encoding="utf-8") as file:
        file.write('{"instruction": "never", "input": "", "output": ""}\n')
    command = [sys.executable, "-c", KILLED, checkpoints["glm3"], data_file, tmp_path / "cache", num_workers]
    root = Path(__file__).parents[1]
    with subprocess.Popen([*map(str, command)], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        [half] = (tmp_path / "cache").glob("tmp-*")
        with pytest.raises(BlockingIOError), open(tmp_path / "cache/key.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ""  # ends when the last process that it started has gone too
    assert half.is_dir()
    monkeypatch.setattr(cache, "key_of", lambda *args: "key")
    assert list(dataset(settings, data_file, tmp_path / "cache")) == list(dataset(settings, data_file, None))
    assert not list((tmp_path / "cache").glob("tmp-*"))


def prepare_on_a_rank(base, path, folder, secs):
    """Ranks: (rows or the error, how many rows were tokenized here). The work takes `secs`."""
    seen, work = [], prepare.tokenize_block

    def slow(*args):
        seen.append(args)
        time.sleep(secs)
        return work(*args)

    prepare.tokenize_block = slow
    settings = settings_of("glm3", {"glm3": base})
    try:
        return list(dataset(settings, path, folder)), len(seen)
    except ValueError as error:
        return str(error), len(seen)


@pytest.mark.slow
def test_one_rank_prepares_and_the_others_wait(settings, checkpoints, data_file, tmp_path):
    found = run_ranks(prepare_on_a_rank, 3, checkpoints["glm3"], data_file, tmp_path / "cache", 1.5)
    assert sorted(count for _, count in found) == [0, 0, 1]
    assert all(rows == list(dataset(settings, data_file, None)) for rows, _ in found)


@pytest.mark.slow
def test_a_bad_row_stops_all_ranks_at_once(checkpoints, data_file, tmp_path):
    damage_last_line(data_file)
    found = run_ranks(prepare_on_a_rank, 3, checkpoints["glm3"], data_file, tmp_path / "cache", 1.5)
    assert sorted(count for _, count in found) == [0, 0, 1]
    assert all("line 12: field 'input'" in error for error, _ in found)


@pytest.mark.slow
def test_a_run_prepares_into_cache_dir_and_the_next_finds_it(checkpoints, data_file, tmp_path):
    printed = []
    for name, flags in (("first", {}), ("second", {}), ("third", {"overwrite_cache": True})):
        flags |= {"cache_dir": tmp_path / "cache", "max_steps": 1}
        printed.append(run("glm3", "lora", checkpoints, data_file, tmp_path / name, **flags)[3])
    assert ["tokenize " in text for text in printed] == [True, False, True]
    assert len(list((tmp_path / "cache").glob("*/header.json"))) == 1


def test_reading_leaves_the_cache_as_it_is(settings, data_file, tmp_path):
    dataset(settings, data_file, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    list(dataset(settings, data_file, tmp_path / "cache"))
    assert contents(tmp_path / "cache") == before
