"""How a run spreads over ranks: the mesh of processes, and the layers that are split across it."""
