"""Pipeline training over slow networks: activations cross as changes in a few bits.

    pipeline = Pipeline(model, loss, compression=Compression.of_bits(forward_bits=3, backward_bits=6))
    loss = pipeline.step(inputs, targets, sample_ids=ids)

Source: AC-SGD, arXiv 2206.01299. See docs/pipelining.md.
"""

from capstan.pipelining.boundary import BoundaryEnd
from capstan.pipelining.compression import Compression
from capstan.pipelining.cutting import cut
from capstan.pipelining.pipeline import SCHEDULES, Pipeline

__all__ = ["SCHEDULES", "BoundaryEnd", "Compression", "Pipeline", "cut"]
