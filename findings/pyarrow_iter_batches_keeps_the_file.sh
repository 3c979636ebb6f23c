#!/usr/bin/env bash
# pyarrow 26.0.1: ParquetFile.iter_batches, which is there to read a file piece by piece, holds all of it in memory.
#
# Batches of 256 rows are read and dropped, from a file of 20,000 rows with four columns of text in two row groups, 77 MiB
# of pages before compression.
#
# Expected: memory for a batch and for the pages that it comes from, some MiB, whatever the size of the file.
# Seen: 63 MiB with the defaults, since pre_buffer=True keeps what was read of all row groups until the end; 40 MiB with
# pre_buffer=False, which still reads whole column chunks; 21 MiB with a buffer_size of 1 MiB as well. The rows are the
# same. A set of preferences has few, long columns and large row groups: its files of gigabytes take gigabytes.
#
# The script exits with 0 as long as the versions below behave so. It needs Python 3.11 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.0
"$folder/venv/bin/python" - "$folder/texts.parquet" <<'PY'
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]
rng = np.random.default_rng(0)
ROWS, COLUMNS = 20_000, 4
texts = {f"text{c}": ["".join(map(chr, rng.integers(97, 123, 1000))) for _ in range(ROWS)] for c in range(COLUMNS)}
pq.write_table(pa.table(texts), path, row_group_size=ROWS // 2, compression="zstd")
del texts
file_mib = pq.read_metadata(path).row_group(0).total_byte_size * 2 / 2**20


def most(**options):
    """The most MiB that reading took beyond what was taken before, and the number of rows."""
    before, highest, rows = pa.total_allocated_bytes(), 0, 0
    with pa.OSFile(path) as source:
        for batch in pq.ParquetFile(source, **options).iter_batches(256):
            rows += batch.num_rows
            highest = max(highest, pa.total_allocated_bytes() - before)
    return highest / 2**20, rows


print(f"pyarrow {pa.__version__}; {ROWS} rows, about {file_mib:.0f} MiB of pages in two row groups")
default, pieces, bounded = most(), most(pre_buffer=False), most(pre_buffer=False, buffer_size=2**20)
for name, (mib, rows) in (("defaults", default), ("pre_buffer=False", pieces), ("and buffer_size=1 MiB", bounded)):
    print(f"{name:24} {mib:6.1f} MiB at most, {rows} rows")
assert default[1] == pieces[1] == bounded[1] == ROWS
assert default[0] > 2 * bounded[0], "changed: the defaults no longer hold far more than a bounded buffer"
assert default[0] > 1.3 * pieces[0], "changed: pre_buffer makes no difference"
PY
