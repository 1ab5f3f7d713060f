"""Commands that make data sets: what is read by training is written here, whole or not at all, and nothing is done twice."""
