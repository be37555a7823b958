"""Environment variables of all our processes. No Ray: scripts without it need them too."""

from __future__ import annotations

# Large tensors come and go with every layer. glibc would return each to the system and fault its
# pages in again, which on a CPU can cost more than the layer (docs/performance.md).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
