"""The memory: drift, merging, slots, read weights and mixing, as a token loop, chunkwise in torch, and in Triton."""
