"""Writes rows as the files that problem sets come in."""

import gzip
import json
import pathlib


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """The same rows in the form that the suffix names."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = json.dumps(rows) if ".json" in path.suffixes else "\n".join(map(json.dumps, rows)) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
