"""From tokens on disk to the micro-batches of a step: store, packing, loader."""
