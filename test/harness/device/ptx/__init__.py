"""A machine that runs the PTX that nvcc makes of a kernel, without a GPU and without an assembler."""
