"""What lies on the disk, whole or not there: files, run directories, checkpoints, weights of others; and what memory there is."""
