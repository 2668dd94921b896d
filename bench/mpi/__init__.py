"""The remote tier measured under MPI, and its protocol simulated for more nodes than there are here."""
