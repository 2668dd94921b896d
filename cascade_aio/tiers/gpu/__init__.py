"""The GPU tier: an arena in device memory, and the copies to and from it. Notes: ``docs/gpu.md``.

``lanes`` orders copies and tells when they end, ``pinning`` makes host memory fit for DMA, ``tier`` joins them with an
extent allocator, ``dlpack`` shows device memory to others, ``cuda`` is the driver. Only ``cuda`` imports cuda-python,
and only when a device is opened.
"""
