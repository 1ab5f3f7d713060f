"""Recipes: functions that return one complete Run, registered by name."""
