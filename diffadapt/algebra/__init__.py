"""What a change of a weight is: expressions, the maps of layers, and their autograd functions."""
