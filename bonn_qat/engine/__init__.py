"""Training and evaluation with signs as bits: kernels in C for CPUs, compiled with the package, and what calls them.

``kernels.c`` has the passes over activations and the binary convolution, ``dispatch.c`` knows which of its variants the
machine runs, and ``library`` loads them. Where there is no library, its callers do the same with plain torch.
"""
