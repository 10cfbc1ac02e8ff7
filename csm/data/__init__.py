"""From shards on disk to packed batches: `shards` reads, `packing` plans, `loader` builds, `datamodule` serves Lightning."""
