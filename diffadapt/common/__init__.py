"""What every room uses and nothing else: files, messages, images, random numbers, the process."""
