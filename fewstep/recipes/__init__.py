"""Recipes: functions that return one complete Run, registered by name. Importing this room makes every name known."""

from fewstep.recipes import analytic as analytic
