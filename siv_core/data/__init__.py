"""Data files: HDF5 written once and read by memory map, foreign ones opened in a child process; rows to batches."""
