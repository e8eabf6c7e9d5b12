"""From files to batches.

Rows: `files`, `formats`. Samples: `recipe`, `prepare`, `cache`, `stream`. Their order: `order`, `sampler`. Batches:
`dataset`, `packing`.
"""
