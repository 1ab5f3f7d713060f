"""Data sets: folders of clips, videos, controls, loaders. It never imports networks."""
