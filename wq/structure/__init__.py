"""What in a transformers model is quantized, and what it is called on disk. No table of models.

The view of models that the offline job and the loader share: `towers` (which stacks of blocks), `linears` (which layers
of a block), `experts` (which 3-D parameters), `names` (where a tensor on disk goes). Together with `wq.hf` and
`wq.pipeline.source` the only code that imports transformers.
"""
