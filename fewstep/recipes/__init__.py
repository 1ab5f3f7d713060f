"""Recipes: functions that return one complete Run, registered by name. Importing this room makes every name known."""

from fewstep.data import mix as mix
from fewstep.data import mock as mock
from fewstep.data import shards as shards
from fewstep.data.folder import dataset as dataset
from fewstep.networks.families import cogvideox as cogvideox
from fewstep.networks.families import dit as dit
from fewstep.networks.families import flux as flux
from fewstep.networks.families import qwen_image as qwen_image
from fewstep.networks.families import unet as unet
from fewstep.networks.families.cosmos import control as control
from fewstep.networks.families.cosmos import network as network
from fewstep.networks.families.wan import experts as experts
from fewstep.recipes import analytic as analytic
from fewstep.recipes import analytic_matching as analytic_matching
from fewstep.recipes import cosmos_predict1 as cosmos_predict1
from fewstep.recipes import cosmos_predict25 as cosmos_predict25
from fewstep.recipes import cosmos_transfer1 as cosmos_transfer1
from fewstep.toyworld import recipes as recipes
