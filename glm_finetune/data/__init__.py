"""From files to batches: `formats` (row -> messages), `dataset` (messages -> tokens -> batches), `sampler` (order)."""
