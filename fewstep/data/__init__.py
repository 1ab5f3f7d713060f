"""The room of data: the toy world, folders of clips, videos, controls, shards, loaders. It never imports networks."""
