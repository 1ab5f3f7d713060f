"""Recipes: functions that return one complete Run, registered by name. Importing this room makes every name known."""

from fewstep.data import folder as folder
from fewstep.data import mix as mix
from fewstep.data import shards as shards
from fewstep.networks import cosmos as cosmos
from fewstep.networks import cosmos_control as cosmos_control
from fewstep.recipes import analytic as analytic
from fewstep.recipes import analytic_matching as analytic_matching
from fewstep.recipes import toyworld as toyworld
