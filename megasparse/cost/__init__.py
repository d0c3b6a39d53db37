"""What training costs, asked by runs and by plans alike: FLOPs, seconds, memory, traffic, the choice of kernels."""
