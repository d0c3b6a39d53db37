"""What both families of kernels need: the build of C++ kernels, where Triton runs, and tables of measurements.

``build`` compiles on first use, ``triton_device`` says where Triton kernels can run and how they are launched,
``medians`` takes times, ``tables`` keeps them by machine.
"""
