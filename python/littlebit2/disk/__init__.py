"""Writing to disk: files and directories that appear whole or not at all, and the folders of runs.

Every writer of this package goes through here. Needs the standard library alone.
"""

from .directory import StagedDirectory, check_apart, check_replaceable, move_into_place
from .errors import FULL, RunError, explain_errors, free_text
from .files import check_new_file, new_file, read_json, reserve, sync, sync_tree, write_file, write_json
from .run import RunDirectory, check_space, differences

__all__ = [
    "FULL",
    "RunDirectory",
    "RunError",
    "StagedDirectory",
    "check_apart",
    "check_new_file",
    "check_replaceable",
    "check_space",
    "differences",
    "explain_errors",
    "free_text",
    "move_into_place",
    "new_file",
    "read_json",
    "reserve",
    "sync",
    "sync_tree",
    "write_file",
    "write_json",
]
