"""Runtime: packed networks on bit operations. It needs torch alone, and is fast where numba is installed.

``layout`` defines how bits lie in memory, ``kernels`` are the loops for a CPU, ``fallback`` is the same in plain torch,
``operators`` registers both as ``torch.ops.bonn_qat``, and ``graph`` describes a network of operators as data.
"""
