"""Pallas kernels for GPUs (Triton) and TPUs (Mosaic): fast forms of references in `seqboat.ops`."""
