"""Plug-ins: found through entry points, registered by hand, made from spec strings.

The names here are public, as `gptk.plugins`; the base classes that plug-ins fill in are in
`gptk.hooks`.
"""

from gptk.errors import shown as shown
from gptk.errors import suggest as suggest
from gptk.hooks.base import Plugin as Plugin
from gptk.options import Options as Options
from gptk.options import from_json as from_json
from gptk.options import from_options as from_options
from gptk.options import from_text as from_text
from gptk.options import option_help as option_help
from gptk.plugins.blame import blaming as blaming
from gptk.plugins.checks import class_problem as class_problem
from gptk.plugins.creating import create as create
from gptk.plugins.creating import short_form as short_form
from gptk.plugins.files import register_file as register_file
from gptk.plugins.kinds import KINDS as KINDS
from gptk.plugins.kinds import Kind as Kind
from gptk.plugins.registry import PluginWarning as PluginWarning
from gptk.plugins.registry import Provided as Provided
from gptk.plugins.registry import failures as failures
from gptk.plugins.registry import find as find
from gptk.plugins.registry import manager as manager
from gptk.plugins.registry import provided as provided
from gptk.plugins.registry import register as register
from gptk.plugins.registry import summary as summary
from gptk.plugins.registry import unregister as unregister
from gptk.plugins.returned import check_logits as check_logits
from gptk.plugins.returned import check_process as check_process
from gptk.spec import parse_spec as parse_spec
from gptk.system.memory import is_out_of_memory as is_out_of_memory
from gptk.system.metadata import Fields as Fields
from gptk.system.metadata import open_regular as open_regular
from gptk.system.metadata import parse_json as parse_json
from gptk.system.metadata import read_json as read_json
from gptk.system.metadata import read_text as read_text
from gptk.system.read_files import ReadFile as ReadFile
