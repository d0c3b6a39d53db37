"""What is in a folder of saved tensors, how two differ, what of one is damaged. Nothing is executed from any file."""
