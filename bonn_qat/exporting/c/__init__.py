"""C: a packed network as a C99 header for firmware."""
