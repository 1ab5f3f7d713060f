"""Recipes: functions that return one complete Run, registered by name. Importing this room makes every name known."""

from fewstep.data import folder as folder
from fewstep.data import mix as mix
from fewstep.data import mock as mock
from fewstep.data import shards as shards
from fewstep.networks import cogvideox as cogvideox
from fewstep.networks import cosmos as cosmos
from fewstep.networks import cosmos_control as cosmos_control
from fewstep.networks import dit as dit
from fewstep.networks import experts as experts
from fewstep.networks import flux as flux
from fewstep.networks import qwen_image as qwen_image
from fewstep.networks import unet as unet
from fewstep.recipes import analytic as analytic
from fewstep.recipes import analytic_matching as analytic_matching
from fewstep.recipes import cosmos_predict1 as cosmos_predict1
from fewstep.recipes import cosmos_predict25 as cosmos_predict25
from fewstep.recipes import cosmos_transfer1 as cosmos_transfer1
from fewstep.recipes import toyworld as toyworld
