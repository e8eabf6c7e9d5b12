"""From files to batches.

Rows: `files`, `blocks`. Samples: `formats` and `conversation` (row -> messages), `samples` (row -> samples), `prepare`
(in many processes), `cache`, `stream`. Their order: `order`, `sampler`. Batches: `dataset`, `packing`. What is in the
data: `report`, `histogram`.
"""
