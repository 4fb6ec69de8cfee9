"""Pallas kernels: fast forms of references in `seqboat.ops`, for GPUs (Triton) and TPUs (Mosaic)."""
