"""The offline job: read a dense model block by block, quantize it, write a checkpoint."""
