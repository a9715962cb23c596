"""Runtime: packed networks run with bit operations; torch and, where it is installed, numba, and nothing else.

``layout`` says how bits lie in memory, ``kernels`` are the loops for a CPU, ``fallback`` is the same in plain torch,
``operators`` registers both as ``torch.ops.bonn_qat``, and ``graph`` is a network of them as data.
"""
