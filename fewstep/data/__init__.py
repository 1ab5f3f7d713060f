"""Data sets: folders of clips, videos, controls, shards, loaders. It never imports networks."""
