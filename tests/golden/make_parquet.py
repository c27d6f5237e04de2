#!/usr/bin/env python3
"""Makes `cases/parquet`: files as Hugging Face's data sets and others write them, by pyarrow. See README.md.

    pip install -r requirements.txt pyarrow==26.0.1

Picture N is 6 + N pixels wide, 5 high, and N everywhere.
"""

import importlib.metadata
import io
import json
import pathlib
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FOLDER = pathlib.Path(__file__).parent / "cases" / "parquet"
NAMES = ["ant", "bee", "cat"]


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 6 + number, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def huggingface(table, names=NAMES):
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def structs(numbers, null=()):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [None if n in null else {"bytes": png(n), "path": f"{n}.png"} for n in numbers]
    return pa.array(rows, kind)


def main():
    if importlib.metadata.version("pyarrow") != "26.0.1":
        sys.exit("expected pyarrow 26.0.1")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)

    def write(name, table, **options):
        pq.write_table(table, FOLDER / name, **options)

    def labels(numbers, kind=pa.int64()):
        return pa.array([n % 3 for n in numbers], kind)

    numbers = list(range(40))
    table = huggingface(pa.table({"image": structs(numbers), "label": labels(numbers)}))
    # As the datasets library writes them: row groups, dictionaries. Then dictionaries that are full after a few pictures,
    # pages of a few pictures, and both kinds of pages; not compressed; and only plain values.
    write("usual.parquet", table, row_group_size=15)
    write("mixed.parquet", table, row_group_size=25, data_page_size=400, write_batch_size=4, dictionary_pagesize_limit=800)
    write("second_version.parquet", table, data_page_size=400, write_batch_size=4, data_page_version="2.0",
          use_dictionary=False, compression="none")
    write("plain.parquet", table, data_page_size=400, write_batch_size=4, use_dictionary=False)
    # Two files of a set.
    first, second = numbers[:13], numbers[13:]
    for name, part in (("part-0.parquet", first), ("part-1.parquet", second)):
        write(name, huggingface(pa.table({"image": structs(part), "label": labels(part)})))
    # Rows without a picture, bytes that are none, labels without names, another order.
    write("holes.parquet", pa.table({"label": labels(numbers[:30], pa.int32()), "image": structs(numbers[:30], null=(4,))}),
          data_page_size=400, write_batch_size=4)
    # Bytes as such, beside others, under other names.
    plain = pa.array([png(n) for n in numbers[:6]], pa.binary())
    text = pa.array([f"a {n}" for n in numbers[:6]])
    write("bytes.parquet", pa.table({"id": labels(numbers[:6]), "caption": text, "scan": plain, "kind": labels(numbers[:6])}))
    write("two.parquet", pa.table({"left": plain, "right": plain, "label": pa.array([0, 1, None, 0, 1, 2])}))
    write("text.parquet", pa.table({"caption": text, "label": labels(numbers[:6])}))
    write("zstd.parquet", huggingface(pa.table({"image": structs(first), "label": labels(first)})), compression="zstd")
    # Only the classes are compressed with it.
    write("label_zstd.parquet", huggingface(pa.table({"image": structs(first), "label": labels(first)})),
          compression={"image.bytes": "snappy", "image.path": "snappy", "label": "zstd"})


if __name__ == "__main__":
    main()
