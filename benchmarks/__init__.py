"""popi_jax and the libraries that a user would otherwise take, measured side by side on the same rows.

`run` is the driver: it writes the rows, starts one `worker` process for each side of a case, lets them take turns, and
records what they report. `sides` holds one module for each library.

All sides run under the same malloc settings (`process.MALLOC`), and bench.json and table.md name them. The records in
results/ are older: there our side alone kept freed memory for reuse, while the peers ran with glibc's defaults (in
results/avx2 our side had the defaults too).

This package imports nothing here, because the peers' environments lack JAX or popi_jax.
"""
