"""What users have beside their data, or take for it: files that are no rows of text.

refuse_foreign(path, ".docx", first_bytes)      # a UserError that says what the file is, and what to do
is_no_data(path)                                # whether a folder's file is passed over
"""

from glm_finetune.errors import UserError

TABLE = "Save it as .xlsx or .csv in the program that made it."
TEXT = "Save it as .txt (UTF-8), a blank line between documents, or as .xlsx or .csv if it is a table."
UNPACK = "Unpack it and name what is in it."
KINDS = {  # suffix -> what a file is, what to do
    ".xls": ("an old Excel file", TABLE),
    ".xlsm": ("an Excel file with macros", TABLE),
    ".xlsb": ("a binary Excel file", TABLE),
    ".ods": ("an OpenDocument table", TABLE),
    ".doc": ("an old Word file", TEXT),
    ".docx": ("a Word file", TEXT),
    ".pptx": ("a PowerPoint file", TEXT),
    ".pdf": ("a PDF", TEXT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"), ("an archive", UNPACK)),
}
BEGINNINGS = {  # first bytes -> what a file is, what to do
    b"%PDF": KINDS[".pdf"],
    b"\xd0\xcf\x11\xe0": ("an old or protected Office file", TABLE),
    b"PK\x03\x04": ("a zip archive, or an Office file under another name (.xlsx is read by its suffix)", UNPACK),
    b"\x1f\x8b": ("a gzip file", "Give it the suffix .gz behind the one that it has unpacked (a.jsonl.gz)."),
    b"PAR1": ("a Parquet file", "Give it the suffix .parquet."),
    b"ARROW1": ("an Arrow file", "Name its folder if save_to_disk made it, or save it as .parquet."),
    **dict.fromkeys((b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd"), ("an archive", UNPACK)),
}
DESCRIPTIONS = ("dataset_info", "dataset_infos")  # of LLaMA-Factory (see `manifest`) or of `datasets`
NO_DATA = {  # names without suffixes
    *DESCRIPTIONS,
    *("readme", "license", "licence", "notice", "changelog", "citation", "requirements"),
    "bad_rows",  # of python -m glm_finetune.data
}


def refuse_foreign(path, suffix, first_bytes):
    """Raise UserError for a file of another kind, told by its suffix or first bytes, or that describes data."""
    found = KINDS.get(suffix) or next(
        (kind for begin, kind in BEGINNINGS.items() if first_bytes.startswith(begin)), None
    )
    if found:
        what, remedy = found
        raise UserError(f"{path}: {what}, which is not read. {remedy}")
    if path.name in [f"{name}.json" for name in DESCRIPTIONS]:
        raise UserError(f"{path}: describes the data beside it and is none. Name the folder, or a file in it.")


def is_no_data(path):
    """Whether a file of a folder is hidden, a note, a description, a list of bad rows or settings of answers."""
    name = path.name.lower()
    return name.startswith((".", "~$")) or name.split(".")[0] in NO_DATA or name.endswith(".settings.json")
