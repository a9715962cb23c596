"""Runtime: packed networks on bit operations. It needs torch alone; ``plugins/bonn-qat-runtime`` makes it fast.

``layout`` defines how bits lie in memory, ``products`` computes with them, ``operators`` registers that as
``torch.ops.bonn_qat``, and ``graph`` describes a network of operators as data. ``planned`` runs a whole network in C.
"""
