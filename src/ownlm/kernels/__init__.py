"""Native kernels for a decoder's step on a CPU, and the plain reference beside them."""
