"""Commands that write data sets for training. Every file is written whole or not at all, and a rerun continues."""
